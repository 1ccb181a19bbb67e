// Sums of squares of many tensors. Each element is read once and squared in float64 (a float32 square is exact there),
// so the error of a sum is <= 1e-13 relative. The order of additions depends on a tensor's size alone: not on its
// dtype, its alignment or the GPU.
#include "cuda/teams.cuh"
#include "cuda/tensor_slices.cuh"

namespace lipcore::cuda {
namespace {

using Squares = Slice<SquareTables, SquareTensor>;

struct Add {
  __device__ SquarePartial operator()(const SquarePartial& a, const SquarePartial& b) const {
    return {a.square + b.square, a.nonfinite + b.nonfinite};
  }
};
using Reduce = ReduceBlock<SquarePartial>;

template <class E>
__device__ __forceinline__ void observe(typename E::Stored stored, double* square, int* nonfinite) {
  const auto x = E::widen(stored);
  *square = add_product(*square, x, x);
  *nonfinite += !isfinite(x);
}

// Cached: an optimizer reads gradients soon.
template <class E, bool kAligned>
__device__ __forceinline__ SquarePartial sum_run(const typename E::Stored* x, int count) {
  double square = 0;
  int nonfinite = 0;
  const int groups = count / kGroup;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads) {
    typename E::Stored lanes[kGroup];
    load_lanes<kAligned, Keep::kCached>(x + i * kGroup, lanes);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) observe<E>(lanes[k], &square, &nonfinite);
  }
  const int rest = groups * kGroup + static_cast<int>(threadIdx.x);
  if (rest < count) observe<E>(x[rest], &square, &nonfinite);
  return {square, static_cast<double>(nonfinite)};
}

// One block per chunk.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_squares(const __grid_constant__ SquareTables tables, const __grid_constant__ Squares slice) {
  __shared__ typename Reduce::TempStorage storage;
  const SliceChunk chunk(slice.head, slice.tensors);
  const SquareTensor& tensor = slice.tensors[chunk.place];
  chunk.write_span(tables.spans, slice.head, slice.tensors, 0);
  SquarePartial sum{};
  with_dtype(tensor.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(tensor.x) + chunk.begin;
    sum = is_aligned(x) ? sum_run<E, true>(x, chunk.count) : sum_run<E, false>(x, chunk.count);
  });
  sum = Reduce(storage).Reduce(sum, Add{});
  if (threadIdx.x == 0) tables.partials[chunk.index] = sum;
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) finish_squares(const __grid_constant__ SquareTables tables) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t tensor = blockIdx.x;
  const SquarePartial own = add_chunks(tables.partials, tables.spans[tensor], Add{});
  const SquarePartial sum = Reduce(storage).Reduce(own, Add{});
  if (threadIdx.x != 0) return;
  tables.rows[tensor] = isfinite(sum.square) ? StepSums{sum.square, 0, 0, sum.square, 0}
                                             : StepSums{kNaN, kNaN, kNaN, kNaN, sum.nonfinite};
}

}  // namespace

Status square_sums(const SquareTables& tables, const std::vector<SquareTensor>& tensors, void* stream) {
  const Status status = launch_slices("adding up squares", &sum_squares, tables, tensors, stream);
  if (status.code) return status;
  return launch("adding up the tensors", &finish_squares, static_cast<int64_t>(tensors.size()), stream, tables);
}

}  // namespace lipcore::cuda
