// Makes tensors whose memory lies on an emulated device look like cuda:0 or cuda:1 to lipcore's core: a DLPack exchange
// table in front of torch's own. All other tensors stay what they are.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "emulator/control.h"
#include "python/dlpack_abi.h"

namespace emulator {
namespace {

using namespace lipcore::dlpack;

const ExchangeApi* g_torch = nullptr;
ExchangeApi g_table;

// DLPack gives a tensor without elements no address; its storage has one.
const void* address_of(PyObject* object, const Tensor& tensor) {
  if (tensor.data) return tensor.data;
  PyObject* storage = PyObject_CallMethod(object, "untyped_storage", nullptr);
  PyObject* address = storage ? PyObject_CallMethod(storage, "data_ptr", nullptr) : nullptr;
  const void* found = address ? PyLong_AsVoidPtr(address) : nullptr;
  Py_XDECREF(address);
  Py_XDECREF(storage);
  PyErr_Clear();
  return found;
}

int from_py_object(void* object, Tensor* out) {
  const int code = g_torch->tensor_from_py_object_no_sync(object, out);
  if (code != 0 || out->device.type != kCPU) return code;
  const int device = emulator_device_of(address_of(static_cast<PyObject*>(object), *out));
  if (device >= 0) out->device = {kCUDA, device};
  return code;
}

void free_managed(ManagedTensor* self) {
  emulator_free(self->tensor.data);
  delete[] self->tensor.shape;
  delete self;
}

// Exactly what was asked for, so that a byte too many is seen.
int allocate(Tensor* prototype, ManagedTensor** out, void* context,
             void (*set_error)(void*, const char*, const char*)) {
  if (prototype->device.type != kCUDA) return g_torch->managed_tensor_allocator(prototype, out, context, set_error);
  const int64_t count = prototype->shape[0];
  auto* made = new ManagedTensor{};
  made->deleter = &free_managed;
  made->tensor = *prototype;
  made->tensor.shape = new int64_t[2]{count, 1};
  made->tensor.strides = made->tensor.shape + 1;
  made->tensor.data = emulator_allocate(count * prototype->dtype.bits / 8, prototype->device.id);
  *out = made;
  return 0;
}

int current_stream(int32_t type, int32_t id, void** out) {
  if (type != kCUDA) return g_torch->current_work_stream(type, id, out);
  *out = emulator_current_stream(id);
  return 0;
}

}  // namespace
}  // namespace emulator

// A capsule for the attribute of torch's tensor type from which lipcore takes torch's table.
extern "C" PyObject* emulator_bridge(PyObject* tensor_type) {
  using namespace emulator;
  PyObject* capsule = PyObject_GetAttrString(tensor_type, kTypeAttribute);
  if (!capsule) return nullptr;
  g_torch = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  Py_DECREF(capsule);
  if (!g_torch) return nullptr;
  g_table = *g_torch;
  g_table.previous = nullptr;
  g_table.tensor_from_py_object_no_sync = &from_py_object;
  g_table.managed_tensor_allocator = &allocate;
  g_table.current_work_stream = &current_stream;
  return PyCapsule_New(&g_table, kCapsuleName, nullptr);
}
