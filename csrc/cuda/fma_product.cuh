// The product of two tiles of channels over positions by multiplying and adding, in float32 or float64.
#pragma once

#include "cuda/weight_sides.cuh"

namespace lipcore::cuda {

__device__ __forceinline__ float fused(float a, float b, float sum) { return __fmaf_rn(a, b, sum); }
__device__ __forceinline__ double fused(double a, double b, double sum) { return __fma_rn(a, b, sum); }

// A block's tile has kTile channels of either factor, and a thread the sums of kRows channels of a and kColumns of b.
template <class Number, int kMicro>
struct FmaProduct {
  using Sum = Number;
  static constexpr int kSide = 16;   // threads along each side of a tile
  static constexpr int kDepth = 16;  // positions that are multiplied at once
  static constexpr int kPad = 4;     // so that threads along the depth write to different banks
  static constexpr int kTile = kSide * kMicro, kRows = kMicro, kColumns = kMicro;
  static constexpr bool kGram = kMicro <= 4, kTotal = kGram;  // registers hold two sets of sums
  static constexpr bool kAlwaysPatches = false;

  struct Memory {
    alignas(16) Sum a[kDepth][kTile + kPad];
    alignas(16) Sum b[kDepth][kTile + kPad];
    Channel a_channels[kTile], b_channels[kTile];
    Block::Storage storage;
  };

  // Which element of a tile's side a thread's j-th is: quads of neighbours, kSide quads after each other.
  __device__ static int element_of(int thread, int j) { return j / kQuad * kSide * kQuad + thread * kQuad + j % kQuad; }
  __device__ static int row_of(int i) { return element_of(static_cast<int>(threadIdx.x) / kSide, i); }
  __device__ static int column_of(int j) { return element_of(static_cast<int>(threadIdx.x) % kSide, j); }

  // Positions [first, first + kDepth) of the channels of a tile, each element by one thread; zeros beyond the ends.
  template <bool kPatches>
  __device__ __forceinline__ static void fill(Sum (&tile)[kDepth][kTile + kPad], const Channel (&channels)[kTile],
                                              const Side& side, int64_t first) {
    with_dtype(side.dtype, [&](auto element) {
      using E = decltype(element);
      const auto* data = static_cast<const typename E::Stored*>(side.data);
      for_each_place<kTile, kDepth, kPatches>(side, channels, first, [&](int k, int m, bool inside, int64_t offset) {
        Sum value = inside ? static_cast<Sum>(E::widen(data[offset])) : Sum{0};
        if constexpr (sizeof(Sum) == 8) value *= side.scale;
        tile[k][m] = value;
      });
    });
  }

  // sums[i][j] += sum over positions of a[m, k] * b[n, k], for this thread's channels m of a and n of b, counted from
  // `row` and `column` on. Called by all threads of the block.
  template <bool kPatches>
  __device__ __forceinline__ static void multiply(const Side& a, const Side& b, int64_t row, int64_t column,
                                                  Memory& memory, Sum (&sums)[kRows][kColumns]) {
    const auto thread = static_cast<int>(threadIdx.x), down = thread / kSide, across = thread % kSide;
    if (thread < kTile) {
      memory.a_channels[thread] = channel_of<kPatches>(a, row + thread);
      memory.b_channels[thread] = channel_of<kPatches>(b, column + thread);
    }
    const bool works = row + down * kQuad < a.channels && column + across * kQuad < b.channels;
    // The next call writes the channels when all threads have passed the last barrier here, and so have read them.
    for (int64_t first = 0; first < a.positions; first += kDepth) {
      __syncthreads();  // for the channels, and because the tiles are used again
      fill<kPatches>(memory.a, memory.a_channels, a, first);
      fill<kPatches>(memory.b, memory.b_channels, b, first);
      __syncthreads();
      if (!works) continue;
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        Sum of_a[kMicro], of_b[kMicro];
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          of_a[j] = memory.a[k][element_of(down, j)];
          of_b[j] = memory.b[k][element_of(across, j)];
        }
#pragma unroll
        for (int i = 0; i < kMicro; ++i)
#pragma unroll
          for (int j = 0; j < kMicro; ++j) sums[i][j] = fused(of_a[i], of_b[j], sums[i][j]);
      }
    }
  }
};

}  // namespace lipcore::cuda
