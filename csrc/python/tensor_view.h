// The gatekeeper: every tensor that reaches a kernel passes through view_tensor(). It accepts a plain torch.Tensor (or
// a subclass without __torch_dispatch__) of a floating type the kernels know, on a device they run on, with memory
// behind it; view_integers() does the same for int64, of which ids and offsets are. Everything else is refused with a
// Python TypeError or ValueError that names the argument, what it was and the way out; the words for unusual tensors
// are lipcore/_connect.py, which the gatekeeper calls.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "math/dtype.h"
#include "python/dlpack_abi.h"

namespace lipcore {

struct TensorView {
  void* data;
  DType dtype;
  int32_t ndim;
  int64_t numel;
  const int64_t* shape;    // borrowed from the tensor
  const int64_t* strides;  // in elements; never null
  dlpack::Device device;

  // The address of an element; null where an empty tensor has no memory, since null takes no offset.
  const char* at(int64_t element) const {
    return data ? static_cast<const char*>(data) + element * item_size(dtype) : nullptr;
  }
  bool on_cpu() const { return device.type == dlpack::kCPU; }
  bool same_device(const TensorView& other) const {
    return device.type == other.device.type && device.id == other.device.id;
  }
  // No gaps and no overlap, in whatever order of dimensions: the elements are one flat run of memory.
  bool is_dense() const;
};

// What an argument is called in an error message: "params[3]" when index >= 0, else "params".
struct ArgumentName {
  const char* name;
  int64_t index = -1;
};

// How much is asked beyond "readable by a kernel".
enum class Access {
  kRead,   // any strides
  kWrite,  // state or output: dense, not overlapping
};

// Tells the gatekeeper what torch's tensors are. `refuse(object, name, index)` raises; `accepts(type)` decides about
// subclasses, once per type. Without this call (the module alone, no torch) every tensor is refused.
bool register_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* refuse, PyObject* accepts);

// Fills `view` of a floating tensor and returns true, or sets a Python exception and returns false. Never touches the
// tensor.
bool view_tensor(PyObject* object, ArgumentName name, Access access, TensorView* view);

// The same of ids or offsets: int64, dense.
bool view_integers(PyObject* object, ArgumentName name, TensorView* view);

// The checks DLPack cannot make, through the tensor's own Python methods (about 0.2 us): 0 fine, 1 the negative bit is
// set (the memory holds -x), -1 refused with a Python exception (storage smaller than the shape and strides say).
int check_storage(PyObject* object, ArgumentName name);

// The stream torch works on, for a CUDA device; false with a Python exception set.
bool current_stream(dlpack::Device device, void** stream);

// Torch's DLPack table; null before register_torch.
const dlpack::ExchangeApi* torch_exchange_api();

// Raises ValueError "<argument>: <message>"; always returns false, so that callers can `return fail(...)`.
bool fail(ArgumentName name, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace lipcore
