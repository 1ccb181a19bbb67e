#include "python/tensor_view.h"

#include <cstdarg>
#include <cstdio>
#include <initializer_list>

#include "python/tensor_text.h"

namespace lipcore {
namespace {

// Types already found to be plain tensors, with their exchange table. Only touched with the GIL held.
struct AcceptedType {
  PyTypeObject* type = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
};
constexpr int kAcceptedTypes = 8;  // Tensor, Parameter, Buffer and a few subclasses; older ones are asked about again
AcceptedType g_accepted[kAcceptedTypes];
unsigned g_next_accepted = 2;
PyObject* g_refuse = nullptr;
PyObject* g_accepts = nullptr;

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), dlpack::kTypeAttribute);
  if (!capsule) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  Py_DECREF(capsule);
  while (api && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api && api->tensor_from_py_object_no_sync) return api;
  if (!PyErr_Occurred())
    PyErr_SetString(PyExc_RuntimeError, "this torch has no DLPack 1.x exchange table; lipcore needs torch >= 2.10");
  return nullptr;
}

bool refuse(PyObject* object, ArgumentName name) {
  // What torch's exporter said (if anything) is replaced by what the case is.
  PyErr_Clear();
  if (!g_refuse) {
    PyErr_Format(PyExc_TypeError, "%s: lipcore._core used without torch; import lipcore first", name.name);
    return false;
  }
  PyObject* result = PyObject_CallFunction(g_refuse, "OsL", object, name.name, static_cast<long long>(name.index));
  Py_XDECREF(result);
  if (!PyErr_Occurred())
    PyErr_Format(PyExc_TypeError, "%s: not a tensor lipcore can read (%s)", name.name, Py_TYPE(object)->tp_name);
  return false;
}

const dlpack::ExchangeApi* api_of(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  for (const AcceptedType& accepted : g_accepted)
    if (accepted.type == type) return accepted.api;
  if (!g_accepts) return nullptr;
  PyObject* answer = PyObject_CallFunctionObjArgs(g_accepts, reinterpret_cast<PyObject*>(type), nullptr);
  const bool yes = answer && PyObject_IsTrue(answer) == 1;
  Py_XDECREF(answer);
  if (!yes) return nullptr;
  const dlpack::ExchangeApi* api = exchange_api(type);
  if (!api) return nullptr;
  AcceptedType& slot = g_accepted[g_next_accepted];
  g_next_accepted = g_next_accepted + 1 < kAcceptedTypes ? g_next_accepted + 1 : 2;
  Py_INCREF(type);  // a cached type must not be freed and its address reused
  Py_XDECREF(reinterpret_cast<PyObject*>(slot.type));
  slot = {type, api};
  return api;
}

bool dtype_of(dlpack::DataType type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return *out = DType::kFloat32, true;
  if (type.code == dlpack::kFloat && type.bits == 64) return *out = DType::kFloat64, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return *out = DType::kFloat16, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return *out = DType::kBfloat16, true;
  if (type.code == dlpack::kInt && type.bits == 64) return *out = DType::kInt64, true;
  return false;
}

}  // namespace

bool TensorView::is_dense() const {
  if (numel <= 1) return true;
  int64_t expected = 1;  // stride of the next dimension, innermost first; any order of dimensions will do
  while (expected < numel) {
    int found = -1;
    for (int d = 0; d < ndim && found < 0; ++d)
      if (shape[d] > 1 && strides[d] == expected) found = d;
    if (found < 0) return false;
    expected *= shape[found];
  }
  return true;
}

bool register_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* refuse, PyObject* accepts) {
  const auto* api = exchange_api(reinterpret_cast<PyTypeObject*>(tensor_type));
  if (!api) return false;
  for (PyObject* object : {tensor_type, parameter_type, refuse, accepts}) Py_INCREF(object);  // for ever
  g_accepted[0] = {reinterpret_cast<PyTypeObject*>(tensor_type), api};
  g_accepted[1] = {reinterpret_cast<PyTypeObject*>(parameter_type), api};
  g_refuse = refuse;
  g_accepts = accepts;
  return true;
}

namespace {

// Of any dtype the core knows.
bool view_any(PyObject* object, ArgumentName name, TensorView* view) {
  const dlpack::ExchangeApi* api = api_of(object);
  if (!api) return refuse(object, name);
  dlpack::Tensor tensor;
  if (api->tensor_from_py_object_no_sync(object, &tensor) != 0) return refuse(object, name);
  if (!dtype_of(tensor.dtype, &view->dtype)) return refuse(object, name);
  if (tensor.device.type != dlpack::kCPU && tensor.device.type != dlpack::kCUDA) return refuse(object, name);
  view->ndim = tensor.ndim;
  view->shape = tensor.shape;
  view->strides = tensor.strides;
  view->device = tensor.device;
  view->numel = 1;
  for (int d = 0; d < tensor.ndim; ++d) view->numel *= tensor.shape[d];
  if (view->numel && !tensor.data) return refuse(object, name);
  if (tensor.ndim && !tensor.strides) return refuse(object, name);
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

}  // namespace

bool view_tensor(PyObject* object, ArgumentName name, Access access, TensorView* view) {
  if (!view_any(object, name, view)) return false;
  if (view->dtype == DType::kInt64) return refuse(object, name);
  if (access == Access::kWrite && !view->is_dense())
    return fail(name, "lipcore writes to it, so it must be dense: no gaps and no overlap; pass a contiguous tensor");
  return true;
}

bool view_integers(PyObject* object, ArgumentName name, TensorView* view) {
  if (!view_any(object, name, view)) return false;
  if (view->dtype != DType::kInt64) {
    PyErr_Format(PyExc_TypeError, "%s: expected an int64 tensor, got %s; pass tensor.long()", name.name,
                 dtype_name(view->dtype));
    return false;
  }
  if (!view->is_dense()) return fail(name, "is read as one run of memory; pass a contiguous tensor");
  return true;
}

namespace {

// tensor.<name>() as a number; -1 with a Python exception set.
int64_t call_for_int(PyObject* object, PyObject* name) {
  PyObject* result = PyObject_CallMethodNoArgs(object, name);
  const int64_t value = result ? PyLong_AsLongLong(result) : -1;
  Py_XDECREF(result);
  return value;
}

}  // namespace

int check_storage(PyObject* object, ArgumentName name) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const untyped_storage = PyUnicode_InternFromString("untyped_storage");
  static PyObject* const nbytes = PyUnicode_InternFromString("nbytes");
  static PyObject* const storage_offset = PyUnicode_InternFromString("storage_offset");
  TensorView view;
  if (!view_tensor(object, name, Access::kRead, &view)) return -1;
  const int64_t negative = call_for_int(object, is_neg);
  if (PyErr_Occurred() || view.numel == 0) return static_cast<int>(negative);
  PyObject* storage = PyObject_CallMethodNoArgs(object, untyped_storage);
  if (!storage) return -1;
  const int64_t size = call_for_int(storage, nbytes);
  Py_DECREF(storage);
  int64_t last = PyErr_Occurred() ? -1 : call_for_int(object, storage_offset);
  if (PyErr_Occurred()) return -1;
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  const int64_t needed = (last + 1) * item_size(view.dtype);
  if (needed > size) {
    fail(
        name,
        "its shape and strides need %lld bytes of storage, but the storage has %lld (resized or freed?); pass a tensor "
        "whose memory is there",
        static_cast<long long>(needed), static_cast<long long>(size));
    return -1;
  }
  return static_cast<int>(negative);
}

bool current_stream(dlpack::Device device, void** stream) {
  const auto* api = g_accepted[0].api;
  if (api && api->current_work_stream && api->current_work_stream(device.type, device.id, stream) == 0) return true;
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch did not tell its current CUDA stream");
  return false;
}

const dlpack::ExchangeApi* torch_exchange_api() { return g_accepted[0].api; }

bool fail(ArgumentName name, const char* format, ...) {
  char message[768];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  if (name.index >= 0)
    PyErr_Format(PyExc_ValueError, "%s[%lld]: %s", name.name, static_cast<long long>(name.index), message);
  else
    PyErr_Format(PyExc_ValueError, "%s: %s", name.name, message);
  return false;
}

}  // namespace lipcore
