#include "trajectory/ledger.h"

#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {

Ledger::~Ledger() {
  for (PyObject* object : owned_) Py_XDECREF(object);
}

bool Ledger::open(PyObject* rows, PyObject* recent, PyObject* cursor, int64_t tensors) {
  TensorView r, ring, place;
  if (!view_tensor(rows, {"rows"}, Access::kWrite, &r) || !view_tensor(recent, {"recent"}, Access::kWrite, &ring) ||
      !view_tensor(cursor, {"cursor"}, Access::kWrite, &place))
    return false;
  const auto is_table = [](const TensorView& t, int64_t columns) {
    return t.dtype == DType::kFloat64 && t.ndim >= 2 && t.shape[t.ndim - 1] == columns && t.strides[t.ndim - 1] == 1;
  };
  if (!is_table(r, kTrajectoryColumns) || r.ndim != 2 || r.shape[0] <= tensors || tensors < 0)
    return fail({"rows"}, "expected a float64 tensor of shape [tensors + groups + 1, %d], got %s %s",
                kTrajectoryColumns, dtype_name(r.dtype), ShapeText(r).text);
  if (!is_table(ring, 2) || ring.ndim != 3 || ring.shape[0] < 1 || ring.shape[1] != r.shape[0] || !ring.same_device(r))
    return fail({"recent"}, "expected a float64 tensor of shape [ring, %lld, 2] beside the rows, got %s %s",
                static_cast<long long>(r.shape[0]), dtype_name(ring.dtype), ShapeText(ring).text);
  if (place.dtype != DType::kFloat64 || place.numel != 2 || !place.same_device(r))
    return fail({"cursor"}, "expected a float64 tensor of shape [2] beside the rows, got %s %s",
                dtype_name(place.dtype), ShapeText(place).text);
  tables_ = {static_cast<TrajectoryRow*>(r.data), tensors,       r.shape[0] - tensors - 1,
             static_cast<RecentStep*>(ring.data), ring.shape[0], static_cast<double*>(place.data)};
  device_ = r.device;
  group_sums_.assign(static_cast<size_t>(tables_.groups) + 1, {});
  if (on_cpu()) {
    for (int64_t i = 0; i < tensors; ++i)
      if (!(tables_.rows[i].group >= 0 && tables_.rows[i].group < static_cast<double>(tables_.groups)))
        return fail({"rows", i}, "its group is not one of the %lld groups", static_cast<long long>(tables_.groups));
  }
  PyObject* owned[] = {rows, recent, cursor};
  for (int i = 0; i < 3; ++i) {
    Py_INCREF(owned[i]);
    owned_[i] = owned[i];
  }
  return true;
}

void Ledger::observe(const StepSums* sums) {
  for (StepSums& group : group_sums_) group = no_member();
  StepSums& total = group_sums_.back();
  RecentStep* recent = tables_.recent + static_cast<int64_t>(*tables_.cursor) % tables_.ring * tables_.row_count();
  for (int64_t i = 0; i < tables_.tensors; ++i) {
    TrajectoryRow* row = &tables_.rows[i];
    observe_row(row, recent++, sums[i]);
    merge_member(&group_sums_[static_cast<size_t>(row->group)], sums[i]);
    merge_member(&total, sums[i]);
  }
  for (size_t g = 0; g < group_sums_.size(); ++g)
    observe_group(&tables_.rows[tables_.tensors + static_cast<int64_t>(g)], recent++, group_sums_[g]);
  *tables_.cursor += 1;
}

bool Ledger::observe_tensor(PyObject* sums) {
  TensorView view;
  if (!view_tensor(sums, {"sums"}, Access::kWrite, &view)) return false;
  if (view.dtype != DType::kFloat64 || view.ndim != 2 || view.shape[0] != tables_.tensors ||
      view.shape[1] != kStepSums || (view.numel && view.strides[1] != 1) || view.device.type != device_.type ||
      view.device.id != device_.id)
    return fail({"sums"}, "expected a float64 tensor of shape [%lld, %d] beside the ledger, got %s %s",
                static_cast<long long>(tables_.tensors), kStepSums, dtype_name(view.dtype), ShapeText(view).text);
  const auto* data = static_cast<const StepSums*>(view.data);
  if (on_cpu()) {
    observe(data);
    return true;
  }
#if defined(LIPCORE_WITH_CUDA)
  return cuda::observe_sums(tables_, data, device_);
#else
  return fail({"sums"}, "are on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON");
#endif
}

}  // namespace lipcore
