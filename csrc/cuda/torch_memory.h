// Device memory from torch's caching allocator, by way of its DLPack table: ordered in torch's current stream, part of
// torch's memory statistics, allowed while a CUDA graph is captured, and no driver call once the allocator is warm.
// cudaMallocAsync would be a second pool beside torch's that gives its memory back at every synchronisation.
#pragma once

#include "python/dlpack_abi.h"

namespace lipcore::cuda {

class TorchMemory {
 public:
  TorchMemory() = default;
  TorchMemory(const TorchMemory&) = delete;
  TorchMemory& operator=(const TorchMemory&) = delete;
  ~TorchMemory() { release(); }

  // At least `bytes` bytes, aligned to 64; what was held before is given back. False with a Python exception set.
  bool allocate(dlpack::Device device, int64_t bytes);
  void release();

  // The next `count` objects of type T. Called in the order and with the counts whose sizes were added up.
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += size_of<T>(count);
    return taken;
  }
  template <class T>
  static int64_t size_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  dlpack::ManagedTensor* tensor_ = nullptr;
  char* next_ = nullptr;
};

}  // namespace lipcore::cuda
