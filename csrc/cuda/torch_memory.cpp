#include "cuda/torch_memory.h"

#include "python/tensor_view.h"

namespace lipcore::cuda {
namespace {

void set_error(void*, const char* kind, const char* message) {
  PyErr_Format(PyExc_RuntimeError, "torch could not allocate scratch memory: %s (%s)", message, kind);
}

}  // namespace

bool TorchMemory::allocate(dlpack::Device device, int64_t bytes) {
  release();
  const dlpack::ExchangeApi* api = torch_exchange_api();
  if (!api || !api->managed_tensor_allocator) {
    PyErr_SetString(PyExc_RuntimeError, "no torch to allocate scratch memory with; import lipcore first");
    return false;
  }
  int64_t shape = (bytes + 7) / 8, stride = 1;
  dlpack::Tensor prototype{nullptr, device, 1, {dlpack::kFloat, 64, 1}, &shape, &stride, 0};
  if (api->managed_tensor_allocator(&prototype, &tensor_, nullptr, &set_error) != 0 || !tensor_) {
    tensor_ = nullptr;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch could not allocate scratch memory");
    return false;
  }
  next_ = static_cast<char*>(tensor_->tensor.data) + tensor_->tensor.byte_offset;
  return true;
}

void TorchMemory::release() {
  if (tensor_ && tensor_->deleter) tensor_->deleter(tensor_);
  tensor_ = nullptr;
  next_ = nullptr;
}

}  // namespace lipcore::cuda
