// Both factors of a sum of outer products over positions, wherever they lie: of a Linear layer, a convolution, or Gram
// matrices of tokens.
#pragma once

#include <cstdint>

#include "cuda/common.cuh"
#include "cuda/packed_rows.cuh"
#include "cuda/quads.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {

// Where an element lies is the sum of a channel's place, of x that of a channel at a tap of the kernel, and a
// position's.
struct Place {
  int64_t offset;
  int32_t at[3];  // in the image; of a tap relative to the position
};

constexpr int32_t kNowhere = INT32_MIN;  // at[0] of a place beyond the last

struct Channel : Place {};
struct Position : Place {};

// One side of a product: elements [channel m, position k] of one sample.
struct Side {
  const void* data;  // of the sample and the group
  DType dtype;
  int64_t channels, channel;
  int64_t positions, along[3];
  int64_t out[3];  // the shape of positions
  bool flat;       // places have one stride, the last of `along`
  bool runs;       // positions are neighbours in memory rather than channels
  bool vectors;    // eight of these neighbours at a time lie on 16 bytes
  bool patches;    // of x at the taps of a kernel
  bool swapped;    // channels are places and positions channels
  int64_t inputs;  // of patches: channels are [tap, input]
  const ConvShape* shape;
  double scale;  // a power of two
};

// 64-bit divisions are calls of 70 instructions, and nearly all numbers are small.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t divisor, int64_t* rest) {
  if (static_cast<uint64_t>(a) <= 0xffffffffu && static_cast<uint64_t>(divisor) <= 0xffffffffu) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(divisor);
    *rest = static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(divisor);
    return quotient;
  }
  const int64_t quotient = a / divisor;
  *rest = a - quotient * divisor;
  return quotient;
}

// The place of channel m, of x of a channel at a tap.
__device__ __forceinline__ Place place_of_channel(const Side& side, int64_t m) {
  if (!side.patches) return {m * side.channel, {0, 0, 0}};
  const ConvShape& shape = *side.shape;
  int64_t input, tap[3], rest;
  rest = divide(m, side.inputs, &input);
  rest = divide(rest, shape.kernel[2], &tap[2]);
  tap[0] = divide(rest, shape.kernel[1], &tap[1]);
  Place place{input * side.channel, {}};
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const int64_t at = tap[d] * shape.dilation[d] - shape.padding[d];
    place.offset += at * side.along[d];
    place.at[d] = static_cast<int32_t>(at);
  }
  return place;
}

__device__ __forceinline__ Place place_of_position(const Side& side, int64_t k) {
  if (side.flat) return {k * side.along[2], {0, 0, 0}};
  int64_t at[3], rest;
  rest = divide(k, side.out[2], &at[2]);
  at[0] = divide(rest, side.out[1], &at[1]);
  Place place{0, {}};
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (side.patches) at[d] *= side.shape->stride[d];
    place.offset += at[d] * side.along[d];
    place.at[d] = static_cast<int32_t>(at[d]);
  }
  return place;
}

template <bool kPatches>
__device__ __forceinline__ Channel channel_of(const Side& side, int64_t m) {
  if (m >= side.channels) return {{0, {kNowhere, 0, 0}}};
  if (!kPatches) return {{m * side.channel, {0, 0, 0}}};
  return {side.swapped ? place_of_position(side, m) : place_of_channel(side, m)};
}

template <bool kPatches>
__device__ __forceinline__ Position position_of(const Side& side, int64_t k) {
  if (k >= side.positions) return {{0, {kNowhere, 0, 0}}};
  if (!kPatches) return {{k * side.along[2], {0, 0, 0}}};
  return {side.swapped ? place_of_channel(side, k) : place_of_position(side, k)};
}

template <bool kPatches>
__device__ __forceinline__ bool reads(const Side& side, const Channel& channel, const Position& position) {
  if (position.at[0] == kNowhere || channel.at[0] == kNowhere) return false;
  if constexpr (kPatches) {
    if (side.patches) {
      for (int d = 0; d < 3; ++d) {
        const int64_t at = static_cast<int64_t>(channel.at[d]) + position.at[d];
        if (at < 0 || at >= side.shape->size[d]) return false;
      }
    }
  }
  return true;
}

// Calls put(k, m, inside, offset) for this thread's share of the tile of positions [first, first + kDepth) and all
// channels; an element that is not inside has no offset.
template <int kTile, int kDepth, bool kPatches, class Put>
__device__ __forceinline__ void for_each_place(const Side& side, const Channel (&channels)[kTile], int64_t first,
                                               const Put& put) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto one = [&](int k, int m, const Position& position) {
    put(k, m, reads<kPatches>(side, channels[m], position), channels[m].offset + position.offset);
  };
  if (side.runs) {
    const int k = thread % kDepth;
    const Position position = position_of<kPatches>(side, first + k);
    for (int m = thread / kDepth; m < kTile; m += kThreads / kDepth) one(k, m, position);
  } else {
    const int m = thread % kTile;
    for (int k = thread / kTile; k < kDepth; k += kThreads / kTile) one(k, m, position_of<kPatches>(side, first + k));
  }
}

// How a factor's positions and channels lie in memory, as Side says.
struct Layout {
  bool flat, runs, vectors;
};

struct WeightWork {
  WeightNorms norms;
  int64_t columns;    // of a group's gradient: inputs and taps
  int64_t tile;       // its side
  int64_t units;      // of one sample: tiles of all groups, or pairs of tiles of tokens
  int64_t parts;      // float64 per unit
  bool wide;          // sums are float64
  bool tensor_cores;  // multiply
  Layout x, grad;
};

__device__ __forceinline__ const void* moved(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * item_size(dtype);
}

__device__ __forceinline__ RowRange tokens_of(const WeightNorms& norms, int64_t sample) {
  return rows_of_sample(sample, norms.shape.out[0] * norms.shape.out[1] * norms.shape.out[2], norms.offsets);
}

// Where a group of a sample begins. Tokens of packed samples begin somewhere along the width.
__device__ __forceinline__ const void* start_of(const Factor& factor, const WeightNorms& norms, int64_t sample,
                                                int64_t channel, RowRange tokens) {
  const int64_t before = norms.offsets ? tokens.first * factor.along[2] : sample * factor.sample;
  return moved(factor.data, factor.dtype, before + channel * factor.channel);
}

// A group of a sample of one factor, whose channels begin with `first`; without the taps of a kernel.
__device__ __forceinline__ Side side_of(const WeightNorms& norms, const Factor& factor, const Layout& layout,
                                        int64_t sample, RowRange tokens, int64_t first, int64_t channels) {
  const ConvShape& shape = norms.shape;
  return {start_of(factor, norms, sample, first, tokens),
          factor.dtype,
          channels,
          factor.channel,
          tokens.count,
          {factor.along[0], factor.along[1], factor.along[2]},
          {shape.out[0], shape.out[1], shape.out[2]},
          layout.flat,
          layout.runs,
          layout.vectors,
          false,
          false,
          0,
          &shape,
          1};
}

__device__ __forceinline__ Side grad_side(const WeightWork& work, int64_t sample, int64_t group, RowRange tokens) {
  const int64_t outputs = work.norms.shape.outputs;
  return side_of(work.norms, work.norms.grad, work.grad, sample, tokens, group * outputs, outputs);
}

__device__ __forceinline__ Side x_side(const WeightWork& work, int64_t sample, int64_t group, RowRange tokens) {
  const int64_t inputs = work.norms.shape.inputs;
  Side side = side_of(work.norms, work.norms.x, work.x, sample, tokens, group * inputs, work.columns);
  side.patches = !work.x.flat;
  side.inputs = inputs;
  return side;
}

// In weight_norms_mma.cu: of 16-bit numbers of one dtype.
Status launch_mma_tiles(const WeightWork& work, double* partials, void* stream);

// Places as channels, whose products with each other are a Gram matrix, and channels as positions.
__device__ __forceinline__ Side transposed(Side side) {
  const int64_t places = side.positions;
  side.positions = side.channels;
  side.channels = places;
  side.runs = !side.runs;
  if (side.flat && !side.patches) {
    const int64_t place = side.along[2];
    side.along[2] = side.channel;
    side.channel = place;
  } else {
    side.swapped = true;
  }
  return side;
}

}  // namespace lipcore::cuda
