// Stands in for CUB's header of this name: BlockReduce with the memory traffic and the order of additions of
// BLOCK_REDUCE_WARP_REDUCTIONS. A tree of shuffles per warp, then thread 0 adds the warps' results in order. As CUB
// promises the result to thread 0 alone, every other thread gets garbage.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda_runtime.h"

namespace cub {

enum BlockReduceAlgorithm { BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY, BLOCK_REDUCE_RAKING, BLOCK_REDUCE_WARP_REDUCTIONS };

template <class T, int kThreads, BlockReduceAlgorithm kAlgorithm>
class BlockReduce {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(kAlgorithm == BLOCK_REDUCE_WARP_REDUCTIONS && kThreads % emulator::kWarp == 0, "all that is here");
  static constexpr int kWarps = kThreads / emulator::kWarp;

 public:
  struct TempStorage {
    T of_warp[kWarps];
  };
  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  template <class Operation>
  T Reduce(T value, Operation operation) {
    if (blockDim.x != kThreads) emulator::finding("BlockReduce<%d> in a block of %u threads", kThreads, blockDim.x);
    const int lane = static_cast<int>(threadIdx.x) % emulator::kWarp;
    for (int step = 1; step < emulator::kWarp; step *= 2) {
      const T other = __shfl_down_sync(~0u, value, step);
      if (lane + step < emulator::kWarp) value = operation(value, other);
    }
    if (lane == 0) storage_.of_warp[threadIdx.x / emulator::kWarp] = value;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int warp = 1; warp < kWarps; ++warp) value = operation(value, storage_.of_warp[warp]);
    else
      std::memset(static_cast<void*>(&value), 0xcb, sizeof value);
    return value;
  }
  T Sum(T value) {
    return Reduce(value, [](const T& a, const T& b) { return a + b; });
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
