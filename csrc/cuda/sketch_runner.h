// The CUDA twins of csrc/ops/sketch.h: tables on the device, kernels queued on torch's current stream, nothing waited
// for.
#pragma once

#include <vector>

#include "cuda/kernels.h"
#include "cuda/torch_memory.h"

namespace lipcore::cuda {

bool sketch(const std::vector<SketchItem>& items, dlpack::Device device, int64_t buckets, uint64_t seed, double* out);

// The stateful form. A step depends on nothing on the host but the pointers: it can be captured in a CUDA graph.
class SketchRunner {
 public:
  // weights null: kept here, for nobody.
  bool plan(const std::vector<SketchItem>& items, dlpack::Device device, int64_t rows, int64_t buckets, uint64_t seed,
            double* sketches, SketchWeight* weights);

  // `moved` when a pointer in items has changed since the last call. Allocates nothing.
  bool step(const std::vector<SketchItem>& items, bool moved);

 private:
  dlpack::Device device_{};
  std::vector<SketchTensor> tensors_;
  SketchTables tables_{};
  TorchMemory memory_;
  bool stale_ = false;  // the table on the device may hold other pointers than tensors_
  bool captured_ = false;
};

}  // namespace lipcore::cuda
