// The product of two tiles of channels over positions by tensor cores: 16-bit numbers of one dtype, products and sums
// in float32. Tiles of the next positions are copied while these are multiplied.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/weight_sides.cuh"

namespace lipcore::cuda {

// Tiles of both factors at kStages runs of positions, which is all that depends on the size.
template <int kTile_>
struct MmaMemory {
  static constexpr int kTile = kTile_;
  static constexpr int kDepth = 32;                   // positions of a stage
  static constexpr int kStages = kTile > 64 ? 2 : 4;  // what static shared memory holds
  static constexpr int kPad = 8;                      // so that eight rows of 16 bytes lie in different banks
  static constexpr int kAsRuns = kTile * (kDepth + kPad), kAsRows = kDepth * (kTile + kPad);
  static constexpr int kElements = kAsRuns > kAsRows ? kAsRuns : kAsRows;

  alignas(16) uint16_t a[kStages][kElements];
  alignas(16) uint16_t b[kStages][kElements];
  Channel a_channels[kTile], b_channels[kTile];
  Block::Storage storage;
};

// A block's tile has kTile channels of either factor, halves of a's and quarters of b's for each of its eight warps; a
// thread has the sums of kRows channels of a and kColumns of b, as add_matrix_product() gives them out.
template <class E, int kTile_>
struct MmaProduct {
  using Sum = float;
  using Memory = MmaMemory<kTile_>;
  static_assert(sizeof(Memory) <= 48 << 10, "static shared memory");
  static constexpr int kTile = kTile_, kDepth = Memory::kDepth, kStages = Memory::kStages;
  static constexpr int kMma = 16;                               // channels of a, and positions, of one product
  static constexpr int kDown = kTile / 2, kAcross = kTile / 4;  // of a warp
  static constexpr int kRows = kDown / 8, kColumns = kAcross / 4;
  static constexpr int kVector = 8;                          // elements that are copied at once
  static constexpr bool kGram = kTile <= 64, kTotal = true;  // registers hold two sets of sums
  static constexpr bool kAlwaysPatches = true;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp / 4 * kDown; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / kWarp % 4 * kAcross; }
  __device__ static int row_of(int i) { return warp_row() + i * 8 + lane() / 4; }
  __device__ static int column_of(int j) { return warp_column() + j / 2 * 8 + lane() % 4 * 2 + j % 2; }

  // Where in a tile position k of channel m is: neighbours in memory are neighbours there.
  __device__ static int place_of(bool runs, int m, int k) {
    return runs ? m * (kDepth + Memory::kPad) + k : k * (kTile + Memory::kPad) + m;
  }

  // Begins to fill the tile of channels from `origin` on with positions [first, first + kDepth); zeros beyond the ends.
  template <bool kPatches>
  __device__ __forceinline__ static void fill(uint16_t* tile, const Channel (&channels)[kTile], const Side& side,
                                              int64_t origin, int64_t first) {
    const auto* data = static_cast<const uint16_t*>(side.data);
    if (!side.vectors) {
      for_each_place<kTile, kDepth, kPatches>(side, channels, first, [&](int k, int m, bool inside, int64_t offset) {
        tile[place_of(side.runs, m, k)] = inside ? data[offset] : uint16_t{0};
      });
      return;
    }
    const int per_row = (side.runs ? kDepth : kTile) / kVector;
#pragma unroll
    for (int turn = 0; turn < kTile * kDepth / kVector / kThreads; ++turn) {
      const int i = turn * kThreads + static_cast<int>(threadIdx.x);
      const int row = i / per_row, begin = i % per_row * kVector;
      const int m = side.runs ? row : begin, k = side.runs ? begin : row;
      if constexpr (kPatches) {
        if (side.patches) {  // a pixel's channels, all or none
          const Position at = position_of<true>(side, first + k);
          const bool inside = reads<true>(side, channels[m], at);
          copy_async(tile + place_of(side.runs, m, k), data + (inside ? channels[m].offset + at.offset : 0),
                     inside ? 2 * kVector : 0);
          continue;
        }
      }
      const int64_t channel = origin + m, position = first + k;
      const int64_t channels_left = side.channels - channel, positions_left = side.positions - position;
      int64_t left = side.runs ? positions_left : channels_left;
      if (channels_left <= 0 || positions_left <= 0) left = 0;
      const int count = left < kVector ? static_cast<int>(left) : kVector;
      const int64_t offset = count > 0 ? channel * side.channel + position * side.along[2] : 0;
      copy_async(tile + place_of(side.runs, m, k), data + offset, count * 2);
    }
  }

  // A fragment of 16 channels from m and 16 positions from k on, in the order that a factor wants: a's matrices go down
  // the channels first, b's down the positions.
  template <bool kOfA>
  __device__ __forceinline__ static void load(const uint16_t* tile, bool runs, int m, int k, uint32_t (&to)[4]) {
    const int matrix = lane() / 8, first = matrix % 2 * 8, second = matrix / 2 * 8, row = lane() % 8;
    m += kOfA ? first : second;
    k += kOfA ? second : first;
    if (runs)
      load_matrices<false>(tile + place_of(true, m + row, k), to);
    else
      load_matrices<true>(tile + place_of(false, m, k + row), to);
  }

  __device__ __forceinline__ static void multiply_tiles(const uint16_t* a, const uint16_t* b, bool a_runs, bool b_runs,
                                                        int64_t positions, float (&sums)[kRows][kColumns]) {
#pragma unroll
    for (int k = 0; k < kDepth; k += kMma) {
      if (k >= positions) break;
      uint32_t of_a[kRows / 2][4], of_b[kColumns / 4][4];
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) load<true>(a, a_runs, warp_row() + i * kMma, k, of_a[i]);
#pragma unroll
      for (int j = 0; j < kColumns / 4; ++j) load<false>(b, b_runs, warp_column() + j * kMma, k, of_b[j]);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i)
#pragma unroll
        for (int j = 0; j < kColumns / 2; ++j) {
          const uint32_t half[2] = {of_b[j / 2][j % 2 * 2], of_b[j / 2][j % 2 * 2 + 1]};
          add_matrix_product<E>(of_a[i], half, sums[2 * i][2 * j], sums[2 * i][2 * j + 1], sums[2 * i + 1][2 * j],
                                sums[2 * i + 1][2 * j + 1]);
        }
    }
  }

  // As FmaProduct's.
  template <bool kPatches>
  __device__ __forceinline__ static void multiply(const Side& a, const Side& b, int64_t row, int64_t column,
                                                  Memory& memory, float (&sums)[kRows][kColumns]) {
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread < kTile) {
      if (!a.vectors || a.patches) memory.a_channels[thread] = channel_of<kPatches>(a, row + thread);
      if (!b.vectors || b.patches) memory.b_channels[thread] = channel_of<kPatches>(b, column + thread);
    }
    const auto begin = [&](int64_t step) {
      const int64_t first = step * kDepth;
      if (first < a.positions) {
        fill<kPatches>(memory.a[step % kStages], memory.a_channels, a, row, first);
        fill<kPatches>(memory.b[step % kStages], memory.b_channels, b, column, first);
      }
      commit_copies();  // an empty group where there is nothing left, so that groups can be counted
    };
    const bool works = row + warp_row() < a.channels && column + warp_column() < b.channels;
    __syncthreads();  // for the channels, and because the last call's tiles are used again
    for (int64_t step = 0; step < kStages - 1; ++step) begin(step);
    for (int64_t step = 0; step * kDepth < a.positions; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // everybody's copies are there, and the tiles of the step before are read
      begin(step + kStages - 1);
      if (works)
        multiply_tiles(memory.a[step % kStages], memory.b[step % kStages], a.runs, b.runs, a.positions - step * kDepth,
                       sums);
    }
  }
};

}  // namespace lipcore::cuda
