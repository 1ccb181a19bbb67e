#include "trajectory/movement_check.h"

#include <algorithm>
#include <cmath>

#include "python/tensor_text.h"

namespace lipcore {

MovementCheck::~MovementCheck() {
  drop();
  Py_XDECREF(recent_);
}

bool MovementCheck::open(PyObject* recent, std::vector<int64_t> places, std::vector<double> units_sq) {
  TensorView ring;
  if (!view_tensor(recent, {"recent"}, Access::kWrite, &ring)) return false;
  if (ring.dtype != DType::kFloat64 || ring.ndim != 3 || ring.shape[0] < 1 || ring.shape[2] != 2 || !ring.on_cpu() ||
      ring.strides[2] != 1 || (ring.shape[1] > 1 && ring.strides[1] != 2))
    return fail({"recent"}, "expected a float64 CPU tensor of shape [steps, tensors, 2], got %s %s",
                dtype_name(ring.dtype), ShapeText(ring).text);
  for (size_t i = 0; i < places.size(); ++i)
    if (places[i] < 0 || places[i] >= ring.shape[1] || (i && places[i] <= places[i - 1]))
      return fail({"places", static_cast<int64_t>(i)}, "expected rising numbers of the ring's %lld tensors, got %lld",
                  static_cast<long long>(ring.shape[1]), static_cast<long long>(places[i]));
  if (units_sq.size() != places.size())
    return fail({"units_sq"}, "expected %zu, one per place, got %zu", places.size(), units_sq.size());
  places_ = std::move(places);
  units_sq_ = std::move(units_sq);
  Py_INCREF(recent);
  recent_ = recent;
  ring_ = static_cast<double*>(ring.data);
  steps_ = ring.shape[0];
  tensors_ = ring.shape[1];
  by_tensor_.assign(static_cast<size_t>(tensors_), nullptr);
  return true;
}

bool MovementCheck::take(std::vector<UpdateItem> items, const std::vector<PyObject*>& holders) {
  drop();
  if (items.size() != places_.size())
    return fail({"params"}, "expected %zu tensors, one per place, got %zu", places_.size(), items.size());
  if (!check_update_items(items)) return false;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].has_previous) return fail({"previous", static_cast<int64_t>(i)}, "is missing; pass every one");
    if (!items[i].w.on_cpu()) return fail({"params", static_cast<int64_t>(i)}, "is not on the CPU, where the ring is");
  }
  items_ = std::move(items);
  for (size_t i = 0; i < items_.size(); ++i) by_tensor_[static_cast<size_t>(places_[i])] = &items_[i];
  for (PyObject* holder : holders) {
    Py_INCREF(holder);
    held_.push_back(holder);
  }
  return true;
}

bool MovementCheck::fits(const std::vector<int64_t>& counts) const {
  if (items_.empty() || counts.size() != by_tensor_.size()) return false;
  for (size_t i = 0; i < counts.size(); ++i)
    if (by_tensor_[i] && by_tensor_[i]->w.numel != counts[i]) return false;
  return true;
}

void MovementCheck::drop() {
  for (const UpdateItem*& item : by_tensor_) item = nullptr;
  items_.clear();
  std::vector<PyObject*> held;
  held.swap(held_);
  for (PyObject* holder : held) Py_DECREF(holder);
}

void MovementCheck::write(const std::vector<UpdateSums>& sums, int64_t step) {
  double* row = ring_ + step % steps_ * tensors_ * 2;
  std::fill(row, row + 2 * tensors_, static_cast<double>(NAN));
  for (size_t i = 0; i < items_.size(); ++i) {
    const auto tensor = static_cast<size_t>(places_[i]);
    const StepSums step_sums = update_row(sums[tensor]);
    if (step_sums.nonfinite > 0) continue;
    double sizes = step_sums.dw_sq + step_sums.weight_sq;
    // The two terms of Nesterov's step may cancel.
    const double mix = items_[i].scalars.mix;
    if (items_[i].has_momentum && mix != 0) sizes += mix * mix * sums[tensor].momentum_sq;
    row[2 * tensor] = sums[tensor].unexplained_sq;
    row[2 * tensor + 1] = units_sq_[i] * sizes;
  }
}

}  // namespace lipcore
