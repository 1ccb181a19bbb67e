// Threads that add up together: neighbouring lanes of a warp, or a block. The order of additions is fixed.
#pragma once

#include <cub/block/block_reduce.cuh>

#include "cuda/common.cuh"

namespace lipcore::cuda {

template <class T>
using ReduceBlock = cub::BlockReduce<T, kThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;

// The host's merge(&into, from) as CUB wants it.
struct Merge {
  template <class T>
  __device__ T operator()(T a, const T& b) const {
    merge(&a, b);
    return a;
  }
};

template <int kSize>
struct Lanes {  // kSize neighbouring lanes of a warp
  __device__ int rank() const { return static_cast<int>(threadIdx.x) % kSize; }
  __device__ static constexpr int size() { return kSize; }
  __device__ unsigned mask() const {
    return kSize == 32 ? 0xffffffffu : ((1u << kSize % 32) - 1) << (threadIdx.x % 32 / kSize * kSize);
  }
  // All lanes of the team get the same bits: at every level both partners add the same two numbers.
  __device__ double sum(double x) const {
#pragma unroll
    for (int distance = kSize / 2; distance; distance /= 2) x += __shfl_xor_sync(mask(), x, distance);
    return x;
  }
  __device__ double max(double x) const {
#pragma unroll
    for (int distance = kSize / 2; distance; distance /= 2) {
      const double other = __shfl_xor_sync(mask(), x, distance);
      x = other > x ? other : x;
    }
    return x;
  }
};

struct Larger {
  __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

struct Block {
  using Reduce = ReduceBlock<double>;
  struct Storage {
    typename Reduce::TempStorage reduce;
    double result;
  };
  Storage* storage;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ static constexpr int size() { return kThreads; }
  __device__ double share(double x) const {
    if (threadIdx.x == 0) storage->result = x;
    __syncthreads();
    x = storage->result;
    __syncthreads();  // the storage may be used again
    return x;
  }
  __device__ double sum(double x) const { return share(Reduce(storage->reduce).Sum(x)); }
  __device__ double max(double x) const { return share(Reduce(storage->reduce).Reduce(x, Larger{})); }
};

}  // namespace lipcore::cuda
