// The frame of every call into CUDA: device, stream, errors in words.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/driver.h"
#include "cuda/kernels.h"
#include "python/tensor_view.h"

namespace lipcore::cuda {

// Makes a device current, and at its end the one before it; finds torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const char* operation) : operation_(operation) {}
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (before_ >= 0 && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }

  bool enter(dlpack::Device device) {
    device_ = device.id;
    int now = -1;
    if (!check(cudaGetDevice(&now), "asking for the current device")) return false;
    if (now != device_) {
      if (!check(cudaSetDevice(device_), "making the device current")) return false;
      before_ = now;
    }
    return current_stream(device, &stream_);
  }

  bool check(cudaError_t error, const char* doing) const {
    if (error == cudaSuccess) return true;
    cudaGetLastError();  // reported here: the next one who asks must not find it
    if (PyErr_Occurred()) return false;
    const std::string reason = reason_of(error, device_);
    PyErr_Format(PyExc_RuntimeError, "%s: failed while %s on cuda:%d: %s (%s)%s%s", operation_, doing, device_,
                 cudaGetErrorString(error), cudaGetErrorName(error), reason.empty() ? "" : ". ", reason.c_str());
    return false;
  }
  bool check(Status status) const { return check(static_cast<cudaError_t>(status.code), status.doing); }

  void* stream() const { return stream_; }

 private:
  const char* operation_;
  int device_ = -1;
  int before_ = -1;
  void* stream_ = nullptr;
};

}  // namespace lipcore::cuda
