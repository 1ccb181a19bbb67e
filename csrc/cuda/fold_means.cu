// Merges the running means of a block of steps into those of the blocks before it: once in 512 steps, in float64, with
// the CPU's operations, so that the means have its bits.
#include "cuda/teams.cuh"
#include "cuda/tensor_slices.cuh"
#include "math/fold.h"

namespace lipcore::cuda {
namespace {

using Means = Slice<FoldTables, FoldTensor>;

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
using Reduce = ReduceBlock<double>;

template <class E>
__device__ __forceinline__ double fold_run(const FoldTensor& tensor, const SliceChunk& chunk, double share) {
  const auto* last = static_cast<const typename E::Stored*>(tensor.last) + chunk.begin;
  const auto* reference = static_cast<const typename E::Stored*>(tensor.reference) + chunk.begin;
  const auto* deviation = static_cast<const typename E::Work*>(tensor.deviation) + chunk.begin;
  double* earlier = tensor.earlier + chunk.begin;
  double sum = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads)
    sum += fold_mean(mean_offset(E::widen(last[i]), E::widen(reference[i]), deviation[i]), &earlier[i], share);
  return sum;
}

// One block per chunk.
__global__ void __launch_bounds__(kThreads)
    fold_chunks(const __grid_constant__ FoldTables tables, const __grid_constant__ Means slice) {
  __shared__ typename Reduce::TempStorage storage;
  const SliceChunk chunk(slice.head, slice.tensors);
  const FoldTensor& tensor = slice.tensors[chunk.place];
  chunk.write_span(tables.spans, slice.head, slice.tensors, 0);
  const double share = tables.share[slice.head.first_tensor + chunk.place];
  double sum = 0;
  with_dtype(tensor.dtype, [&](auto element) { sum = fold_run<decltype(element)>(tensor, chunk, share); });
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) tables.partials[chunk.index] = sum;
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) finish_gaps(const __grid_constant__ FoldTables tables) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t tensor = blockIdx.x;
  const double sum = Reduce(storage).Sum(add_chunks(tables.partials, tables.spans[tensor], Add{}));
  if (threadIdx.x == 0) tables.gap_sq[tensor] = sum;
}

}  // namespace

Status fold_means(const FoldTables& tables, const std::vector<FoldTensor>& tensors, void* stream) {
  const Status status = launch_slices("merging means", &fold_chunks, tables, tensors, stream);
  if (status.code) return status;
  return launch("adding up the tensors", &finish_gaps, static_cast<int64_t>(tensors.size()), stream, tables);
}

}  // namespace lipcore::cuda
