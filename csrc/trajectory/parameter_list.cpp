#include "trajectory/parameter_list.h"

#include <cstring>

namespace lipcore {

uint64_t geometry_of(const TensorView& view) {
  uint64_t hash = static_cast<uint64_t>(view.dtype) + 31 * static_cast<uint64_t>(view.device.type) +
                  1009 * static_cast<uint64_t>(view.device.id) + 65537 * static_cast<uint64_t>(view.ndim);
  for (int d = 0; d < view.ndim; ++d) {
    hash = (hash ^ static_cast<uint64_t>(view.shape[d])) * 0x9e3779b97f4a7c15u;
    if (view.shape[d] > 1) hash = (hash ^ static_cast<uint64_t>(view.strides[d])) * 0xc2b2ae3d27d4eb4fu;
  }
  return hash;
}

ParameterList::~ParameterList() {
  for (ParameterEntry& entry : entries_) {
    Py_XDECREF(entry.owner);
    Py_XDECREF(entry.key);
  }
}

void ParameterList::capture(std::vector<ParameterEntry> entries, dlpack::Device device) {
  entries_ = std::move(entries);
  seen_.assign(entries_.size(), {});
  held_.reserve(entries_.size());
  device_ = device;
}

bool ParameterList::refuse(size_t i, const char* what) const {
  PyErr_Format(PyExc_ValueError, "trajectory: parameter '%s' %s", entries_[i].name.c_str(), what);
  return false;
}

namespace {

// This rank's part of a sharded parameter (FSDP2, tensor parallelism); the DTensor in the module keeps it alive.
PyObject* local_part(PyObject* parameter) {
  if (std::strcmp(Py_TYPE(parameter)->tp_name, "DTensor") != 0) return parameter;
  PyObject* local = PyObject_GetAttrString(parameter, "_local_tensor");
  Py_XDECREF(local);
  return local;
}

}  // namespace

ParameterList::Look ParameterList::look_up(size_t i, TensorView* view) {
  const ParameterEntry& entry = entries_[i];
  PyObject* parameter = PyDict_GetItemWithError(entry.owner, entry.key);
  if (!parameter || parameter == Py_None) {  // register_parameter(name, None) leaves the key
    if (!PyErr_Occurred()) refuse(i, "was removed from its module; call rebind() after such a change");
    return Look::kError;
  }
  parameter = local_part(parameter);
  if (!parameter) return Look::kError;
  if (!view_tensor(parameter, {entry.name.c_str()}, Access::kRead, view)) return Look::kError;
  if (view->device.type != device_.type || view->device.id != device_.id) {
    refuse(i,
           "is on another device than the state of its trajectory; call rebind() after moving a model, and make one "
           "Trajectory per device for a model on several");
    return Look::kError;
  }
  held_.push_back(parameter);
  const uint64_t geometry = geometry_of(*view);
  const Seen& seen = seen_[i];
  if (view->data == seen.data && geometry == seen.geometry && view->data) return Look::kSame;
  if (seen.data && geometry != seen.geometry) {
    refuse(i,
           "changed its shape, dtype, device or memory layout; its state no longer fits it. Call rebind() after "
           "such a change");
    return Look::kError;
  }
  if (!view->is_dense()) {
    refuse(i, "is a strided view, not dense memory; make it contiguous");
    return Look::kError;
  }
  const int negative = check_storage(parameter, {entry.name.c_str()});
  if (negative > 0) refuse(i, "carries the negative bit; replace it by its resolve_neg()");
  return negative ? Look::kError : Look::kNew;
}

}  // namespace lipcore
