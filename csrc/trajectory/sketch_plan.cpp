#include "trajectory/sketch_plan.h"

#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

bool is_contiguous_matrix(const TensorView& view) {
  return view.dtype == DType::kFloat64 && view.ndim == 2 && (view.shape[0] <= 1 || view.strides[0] == view.shape[1]) &&
         (view.shape[1] <= 1 || view.strides[1] == 1);
}

}  // namespace

SketchPlan::~SketchPlan() {
  for (PyObject* object : owned_) Py_XDECREF(object);
}

bool SketchPlan::capture(std::vector<ParameterEntry> entries, std::vector<SketchPlace> places, PyObject* sketches,
                         PyObject* weights, uint64_t seed) {
  const auto n = static_cast<int64_t>(entries.size());
  places_ = std::move(places);
  TensorView s, w;
  const bool fine =
      view_tensor(sketches, {"sketches"}, Access::kWrite, &s) && view_tensor(weights, {"weights"}, Access::kWrite, &w);
  parameters_.capture(std::move(entries), fine ? s.device : device_);  // owns the references from here on
  if (!fine) return false;
  if (!is_contiguous_matrix(s))
    return fail({"sketches"}, "expected a contiguous float64 tensor of shape [rows, buckets], got %s %s",
                dtype_name(s.dtype), ShapeText(s).text);
  if (!is_contiguous_matrix(w) || w.shape[0] != n || w.shape[1] != kSketchWeightColumns)
    return fail({"weights"}, "expected a contiguous float64 tensor of shape [%lld, %d], got %s %s",
                static_cast<long long>(n), kSketchWeightColumns, dtype_name(w.dtype), ShapeText(w).text);
  if (!w.same_device(s)) return fail({"weights"}, "is on another device than sketches; put both on one");
  const int64_t rows = s.shape[0], buckets = s.shape[1];
  if (!check_buckets(buckets)) return false;
  for (int64_t i = 0; i < n; ++i)
    if (places_[i].row < 0 || places_[i].row >= rows)
      return fail({"row", i}, "expected a row of sketches, 0 to %lld, got %lld", static_cast<long long>(rows - 1),
                  static_cast<long long>(places_[i].row));
  device_ = s.device;
  sketches_ = static_cast<double*>(s.data);
  weights_ = static_cast<SketchWeight*>(w.data);
  for (PyObject* object : {sketches, weights}) Py_INCREF(object);
  owned_[0] = sketches;
  owned_[1] = weights;
  items_.assign(places_.size(), {});
  if (!look_up_all()) return false;
  if (device_.type != dlpack::kCPU) {
#if defined(LIPCORE_WITH_CUDA)
    moved_ = false;  // the tables get the pointers as they are now
    cuda_runner_ = std::make_shared<cuda::SketchRunner>();
    return cuda_runner_->plan(items_, device_, rows, buckets, seed, sketches_, weights_);
#else
    return fail({"sketches"},
                "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON "
                "or keep the model on the CPU");
#endif
  }
  runner_.plan(items_, rows, buckets, seed);
  return true;
}

bool SketchPlan::look_up_all() {
  parameters_.begin();
  for (size_t i = 0; i < places_.size(); ++i) {
    TensorView view;
    const auto look = parameters_.look_up(i, &view);
    if (look == ParameterList::Look::kError) return false;
    if (look == ParameterList::Look::kSame) continue;
    if (!check_first_index(places_[i].first_index, view.numel, static_cast<int64_t>(i))) return false;
    moved_ = moved_ || view.data != items_[i].w;
    items_[i] = {view.data, view.dtype, view.numel, places_[i].first_index, places_[i].row};
    parameters_.accept(i, view);
  }
  return true;
}

bool SketchPlan::step() {
  if (!look_up_all()) return false;
  if (device_.type != dlpack::kCPU) {
#if defined(LIPCORE_WITH_CUDA)
    if (!cuda_runner_->step(items_, moved_)) return false;
    moved_ = false;
#endif
    return true;
  }
  const auto run = [this] { runner_.run(items_.data(), sketches_, weights_); };
  if (runner_.total() >= kSerialElements)
    parameters_.without_gil(run);
  else
    run();
  return true;
}

}  // namespace lipcore
