#include "cuda/kernels.h"

namespace lipcore::cuda {
namespace {

int64_t chunks_of(const TensorEntry& tensor) { return (tensor.count + kCudaChunk - 1) / kCudaChunk; }

}  // namespace

std::vector<StepLaunch> schedule_steps(std::vector<TensorEntry>* tensors, int64_t group_bytes, int64_t* chunks) {
  int64_t next = 0;
  for (TensorEntry& tensor : *tensors) {
    if (tensor.count > kCudaChunk) continue;
    tensor.first_chunk = next;
    next += chunks_of(tensor);
  }
  // Chunks that are whole tensors need no second launch: they share the first one with the first group's check.
  std::vector<StepLaunch> launches{{0, 0, next}};
  int64_t bytes = 0, group_first = next;
  for (TensorEntry& tensor : *tensors) {
    if (tensor.count <= kCudaChunk) continue;
    const int64_t size = tensor.count * item_size(tensor.dtype);
    if (next > group_first && bytes + size > group_bytes) {
      // The open group is complete: the next launch steps it and checks the group that this tensor opens.
      launches.push_back({group_first, next - group_first, 0});
      group_first = next;
      bytes = 0;
    }
    tensor.first_chunk = next;
    next += chunks_of(tensor);
    launches.back().checks += chunks_of(tensor);
    bytes += size;
  }
  if (next > group_first) launches.push_back({group_first, next - group_first, 0});
  *chunks = next;
  return launches;
}

}  // namespace lipcore::cuda
