#include "trajectory_plan.h"

namespace lipcore {
namespace {

// Anything that changes the meaning of the flat memory: dtype, device, shape, strides.
uint64_t geometry_of(const TensorView& view) {
  uint64_t hash = static_cast<uint64_t>(view.dtype) + 31 * static_cast<uint64_t>(view.device.type) +
                  1009 * static_cast<uint64_t>(view.device.id) + 65537 * static_cast<uint64_t>(view.ndim);
  for (int d = 0; d < view.ndim; ++d) {
    hash = (hash ^ static_cast<uint64_t>(view.shape[d])) * 0x9e3779b97f4a7c15u;
    if (view.shape[d] > 1) hash = (hash ^ static_cast<uint64_t>(view.strides[d])) * 0xc2b2ae3d27d4eb4fu;
  }
  return hash;
}

bool fail_named(const std::string& name, const char* what) {
  PyErr_Format(PyExc_ValueError, "trajectory: parameter '%s' %s", name.c_str(), what);
  return false;
}

}  // namespace

TrajectoryPlan::~TrajectoryPlan() {
  for (TrajectoryEntry& entry : entries_)
    for (PyObject* object : {entry.owner, entry.key, entry.prev, entry.ref, entry.mean}) Py_XDECREF(object);
  Py_XDECREF(ledger_);
}

bool TrajectoryPlan::capture(std::vector<TrajectoryEntry> entries, int64_t groups, PyObject* ledger) {
  entries_ = std::move(entries);
  const size_t n = entries_.size();
  seen_.assign(n, {});
  items_.assign(n, {});
  sums_.assign(n, {});
  group_sums_.assign(static_cast<size_t>(groups) + 1, {});
  held_.reserve(n);
  TensorView view;
  if (!view_tensor(ledger, {"ledger"}, Access::kWrite, &view)) return false;
  if (view.dtype != DType::kFloat64 || view.ndim != 2 || view.shape[1] != kTrajectoryColumns ||
      view.shape[0] != static_cast<int64_t>(n) + groups + 1)
    return fail({"ledger"}, "expected a float64 tensor of shape [%lld, %d], got %s %s",
                static_cast<long long>(static_cast<int64_t>(n) + groups + 1), kTrajectoryColumns,
                dtype_name(view.dtype), ShapeText(view).text);
  Py_INCREF(ledger);
  ledger_ = ledger;
  rows_ = static_cast<TrajectoryRow*>(view.data);
  device_ = view.device;
  std::vector<int64_t> counts, item_groups;
  for (size_t i = 0; i < n; ++i) {
    if (entries_[i].group < 0 || entries_[i].group >= groups)
      return fail({"group", static_cast<int64_t>(i)}, "out of range");
    if (!look_up(i, &held_)) return false;
    counts.push_back(items_[i].count);
    item_groups.push_back(entries_[i].group);
  }
  if (device_.type != dlpack::kCPU) {
#if defined(LIPCORE_WITH_CUDA)
    moved_ = false;  // the tables get the pointers as they are now
    return cuda_runner_.plan(items_, item_groups, groups, device_, rows_);
#else
    return fail({"ledger"},
                "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON "
                "or keep the model on the CPU");
#endif
  }
  runner_.plan(counts);
  return true;
}

// The slow look, taken at capture and whenever the pointer or the geometry changed.
bool TrajectoryPlan::admit(size_t i, PyObject* parameter, const TensorView& view, uint64_t geometry) {
  const TrajectoryEntry& entry = entries_[i];
  if (seen_[i].data && geometry != seen_[i].geometry)
    return fail_named(entry.name,
                      "changed its shape, dtype, device or memory layout; its state no longer fits it. Make a "
                      "new Trajectory (or Monitor) after such a change");
  if (!view.is_dense()) return fail_named(entry.name, "is a strided view, not dense memory; make it contiguous");
  const int negative = check_storage(parameter, {entry.name.c_str()});
  if (negative < 0) return false;
  if (negative) return fail_named(entry.name, "carries the negative bit; replace it by its resolve_neg()");
  TensorView prev, ref, mean;
  if (!view_tensor(entry.prev, {"prev"}, Access::kWrite, &prev) ||
      !view_tensor(entry.ref, {"ref"}, Access::kWrite, &ref) ||
      !view_tensor(entry.mean, {"mean"}, Access::kWrite, &mean))
    return false;
  const DType mean_dtype = view.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (geometry_of(prev) != geometry || geometry_of(ref) != geometry || mean.dtype != mean_dtype ||
      mean.numel != view.numel || !mean.same_device(view))
    return fail_named(entry.name, "does not match its state's shape, dtype, device or memory layout");
  const TrajectoryItem item{view.data, prev.data, ref.data, mean.data, view.numel, view.dtype, true, 0.5};
  moved_ = moved_ || item.w != items_[i].w || item.w_prev != items_[i].w_prev || item.w0 != items_[i].w0 ||
           item.mean != items_[i].mean;
  items_[i] = item;
  seen_[i] = {view.data, geometry};
  return true;
}

bool TrajectoryPlan::look_up(size_t i, std::vector<PyObject*>* held) {
  const TrajectoryEntry& entry = entries_[i];
  PyObject* parameter = PyDict_GetItemWithError(entry.owner, entry.key);
  if (!parameter) {
    if (PyErr_Occurred()) return false;
    return fail_named(entry.name,
                      "was removed from its module; make a new Trajectory (or Monitor) after such a change");
  }
  TensorView view;
  if (!view_tensor(parameter, {entry.name.c_str()}, Access::kRead, &view)) return false;
  if (view.device.type != device_.type || view.device.id != device_.id)
    return fail_named(entry.name,
                      "is on another device than the state of its trajectory; make a new Trajectory (or Monitor) after "
                      "moving a model, and one per device for a model on several");
  const uint64_t geometry = geometry_of(view);
  if ((view.data != seen_[i].data || geometry != seen_[i].geometry || !view.data) &&
      !admit(i, parameter, view, geometry))
    return false;
  held->push_back(parameter);
  return true;
}

bool TrajectoryPlan::step_on_device() {
#if defined(LIPCORE_WITH_CUDA)
  held_.clear();
  for (size_t i = 0; i < entries_.size(); ++i)
    if (!look_up(i, &held_)) return false;
  if (!cuda_runner_.step(items_, moved_)) return false;
  moved_ = false;
#endif
  return true;
}

bool TrajectoryPlan::step() {
  const bool fine = device_.type == dlpack::kCPU ? step_on_cpu() : step_on_device();
  block += fine;
  return fine;
}

bool TrajectoryPlan::step_on_cpu() {
  const size_t n = entries_.size();
  held_.clear();
  for (size_t i = 0; i < n; ++i) {
    if (!look_up(i, &held_)) return false;
    items_[i].restart = starts_block(rows_[i]);
    items_[i].inv_count = 1.0 / points_after_step(rows_[i]);
  }
  if (runner_.total() >= kSerialElements) {
    // Without the GIL another thread could replace a parameter in its module: hold what is being read.
    for (PyObject* parameter : held_) Py_INCREF(parameter);
    PyThreadState* state = PyEval_SaveThread();
    runner_.run(items_.data(), sums_.data());
    PyEval_RestoreThread(state);
    for (PyObject* parameter : held_) Py_DECREF(parameter);
  } else {
    runner_.run(items_.data(), sums_.data());
  }
  for (StepSums& sums : group_sums_) sums = {};
  StepSums& total = group_sums_.back();
  for (size_t i = 0; i < n; ++i) {
    observe(&rows_[i], sums_[i]);
    merge_member(&group_sums_[entries_[i].group], sums_[i]);
    merge_member(&total, sums_[i]);
  }
  for (size_t g = 0; g < group_sums_.size(); ++g) observe(&rows_[n + g], group_sums_[g]);
  return true;
}

}  // namespace lipcore
