// Norms of weight gradients that are sums of outer products over positions, of Linear layers and convolutions, without
// the gradients: a block makes one tile of a sample's gradient (or of both Gram matrices of its tokens) in registers,
// squares it and adds up. Products and sums over positions are float32 (float64 where an input is), squares float64;
// relative error about 1e-7 sqrt(positions). What left the range of float32, or cancelled in the Gram form, is made
// again in float64, scaled by powers of two, by the block that sees it.
#include <cstdint>
#include <limits>

#include "cuda/common.cuh"
#include "cuda/packed_rows.cuh"
#include "cuda/quads.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

constexpr int kDepth = 16;  // positions that are multiplied at once
constexpr int kSide = 16;   // threads along each side of a tile
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kPad = 4;  // so that threads along the depth write to different banks

// A row of a tile's factor: a channel, or of x a channel at a tap of the kernel.
struct Channel {
  int64_t offset;
  int32_t at[3];  // the tap's place relative to the position's, in the image
};

struct Position {
  int64_t offset;
  int32_t at[3];
  bool inside;
};

// One side of a product: elements [channel m, position k] of one sample.
struct Side {
  const void* data;  // of the sample and the group
  DType dtype;
  int64_t channels, channel;
  int64_t positions, along[3];
  int64_t out[3];  // the shape of positions
  bool flat;       // positions have one stride, the last of `along`
  bool runs;       // positions are neighbours in memory rather than channels
  bool patches;    // of x at the taps of a kernel
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

template <bool kPatches>
__device__ __forceinline__ Channel channel_of(const Side& side, int64_t m) {
  if (m >= side.channels) return {0, {INT32_MIN, 0, 0}};
  if (!kPatches || !side.patches) return {m * side.channel, {0, 0, 0}};
  const ConvShape& shape = *side.shape;
  int64_t input, tap[3], rest;
  rest = divide(m, side.inputs, &input);
  rest = divide(rest, shape.kernel[2], &tap[2]);
  tap[0] = divide(rest, shape.kernel[1], &tap[1]);
  Channel channel{input * side.channel, {}};
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const int64_t at = tap[d] * shape.dilation[d] - shape.padding[d];
    channel.offset += at * side.along[d];
    channel.at[d] = static_cast<int32_t>(at);
  }
  return channel;
}

template <bool kPatches>
__device__ __forceinline__ Position position_of(const Side& side, int64_t k) {
  if (k >= side.positions) return {0, {0, 0, 0}, false};
  if (!kPatches || side.flat) return {k * side.along[2], {0, 0, 0}, true};
  int64_t at[3], rest;
  rest = divide(k, side.out[2], &at[2]);
  at[0] = divide(rest, side.out[1], &at[1]);
  Position position{0, {}, true};
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (side.patches) at[d] *= side.shape->stride[d];
    position.offset += at[d] * side.along[d];
    position.at[d] = static_cast<int32_t>(at[d]);
  }
  return position;
}

template <bool kPatches>
__device__ __forceinline__ bool reads(const Side& side, const Channel& channel, const Position& position) {
  if (!position.inside || channel.at[0] == INT32_MIN) return false;
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

template <class Sum, int kMicro>
struct Memory {
  static constexpr int kTile = kSide * kMicro;
  alignas(16) Sum a[kDepth][kTile + kPad];
  alignas(16) Sum b[kDepth][kTile + kPad];
  Channel a_channels[kTile], b_channels[kTile];
  Block::Storage storage;
};

// Positions [first, first + kDepth) of the channels of a tile, each element by one thread; zeros beyond the ends.
template <class Sum, int kTile, bool kPatches>
__device__ __forceinline__ void fill(Sum (&tile)[kDepth][kTile + kPad], const Channel (&channels)[kTile],
                                     const Side& side, int64_t first) {
  const auto thread = static_cast<int>(threadIdx.x);
  with_dtype(side.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* data = static_cast<const typename E::Stored*>(side.data);
    const auto put = [&](int k, int m, const Position& position) {
      Sum value = 0;
      if (reads<kPatches>(side, channels[m], position))
        value = static_cast<Sum>(E::widen(data[channels[m].offset + position.offset]));
      if constexpr (sizeof(Sum) == 8) value *= side.scale;
      tile[k][m] = value;
    };
    if (side.runs) {
      const int k = thread % kDepth;
      const Position position = position_of<kPatches>(side, first + k);
      for (int m = thread / kDepth; m < kTile; m += kThreads / kDepth) put(k, m, position);
    } else {
      const int m = thread % kTile;
      for (int k = thread / kTile; k < kDepth; k += kThreads / kTile) put(k, m, position_of<kPatches>(side, first + k));
    }
  });
}

__device__ __forceinline__ float fused(float a, float b, float sum) { return __fmaf_rn(a, b, sum); }
__device__ __forceinline__ double fused(double a, double b, double sum) { return __fma_rn(a, b, sum); }

// Which element of a tile's side a thread's j-th is: quads of neighbours, kSide quads after each other.
__device__ __forceinline__ int element_of(int thread, int j) {
  return j / kQuad * kSide * kQuad + thread * kQuad + j % kQuad;
}

// sums[i][j] += sum over positions of a[m, k] * b[n, k], for this thread's channels m of a and n of b, counted from
// `row` and `column` on. Called by all threads of the block.
template <class Sum, int kMicro, bool kPatches>
__device__ __forceinline__ void multiply(const Side& a, const Side& b, int64_t row, int64_t column,
                                         Memory<Sum, kMicro>& memory, Sum (&sums)[kMicro][kMicro]) {
  constexpr int kTile = kSide * kMicro;
  const auto thread = static_cast<int>(threadIdx.x), down = thread / kSide, across = thread % kSide;
  if (thread < kTile) {
    memory.a_channels[thread] = channel_of<kPatches>(a, row + thread);
    memory.b_channels[thread] = channel_of<kPatches>(b, column + thread);
  }
  const bool works = row + down * kQuad < a.channels && column + across * kQuad < b.channels;
  // The next call writes the channels when all threads have passed the last barrier here, and so have read them.
  for (int64_t first = 0; first < a.positions; first += kDepth) {
    __syncthreads();  // for the channels, and because the tiles are used again
    fill<Sum, kTile, kPatches>(memory.a, memory.a_channels, a, first);
    fill<Sum, kTile, kPatches>(memory.b, memory.b_channels, b, first);
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

struct Work {
  WeightNorms norms;
  int64_t columns;       // of a group's gradient: inputs and taps
  int64_t down, across;  // tiles
  int64_t units;         // of one sample: tiles of all groups, or pairs of tiles of tokens
  int64_t parts;         // float64 per unit
  bool wide;             // sums are float64
  bool x_flat, grad_flat, x_runs, grad_runs;
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

__device__ __forceinline__ Side grad_side(const Work& work, int64_t sample, int64_t group, RowRange tokens) {
  const WeightNorms& norms = work.norms;
  const ConvShape& shape = norms.shape;
  const Factor& grad = norms.grad;
  return {start_of(grad, norms, sample, group * shape.outputs, tokens),
          grad.dtype,
          shape.outputs,
          grad.channel,
          tokens.count,
          {grad.along[0], grad.along[1], grad.along[2]},
          {shape.out[0], shape.out[1], shape.out[2]},
          work.grad_flat,
          work.grad_runs,
          false,
          0,
          &shape,
          1};
}

__device__ __forceinline__ Side x_side(const Work& work, int64_t sample, int64_t group, RowRange tokens) {
  const WeightNorms& norms = work.norms;
  const ConvShape& shape = norms.shape;
  const Factor& x = norms.x;
  return {start_of(x, norms, sample, group * shape.inputs, tokens),
          x.dtype,
          work.columns,
          x.channel,
          tokens.count,
          {x.along[0], x.along[1], x.along[2]},
          {shape.out[0], shape.out[1], shape.out[2]},
          work.x_flat,
          work.x_runs,
          !work.x_flat,
          shape.inputs,
          &shape,
          1};
}

// Calls visit(i, j) for this thread's elements of a tile with so many rows and columns left: beyond them an infinite
// factor has met a zero.
template <int kMicro, class Visit>
__device__ __forceinline__ void for_each_element(int64_t rows, int64_t columns, const Visit& visit) {
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kMicro; ++i)
#pragma unroll
    for (int j = 0; j < kMicro; ++j)
      if (element_of(thread / kSide, i) < rows && element_of(thread % kSide, j) < columns) visit(i, j);
}

template <class Sum, int kMicro, bool kPatches>
__device__ __forceinline__ double tile_squares(const Work& work, int64_t sample, int64_t unit, RowRange tokens,
                                               double x_scale, double grad_scale, Memory<Sum, kMicro>& memory) {
  constexpr int kTile = kSide * kMicro;
  const int64_t down = (work.norms.shape.outputs + kTile - 1) / kTile, across = (work.columns + kTile - 1) / kTile;
  int64_t tile, column;
  const int64_t group = divide(unit, down * across, &tile);
  const int64_t row = divide(tile, across, &column);
  Side grad = grad_side(work, sample, group, tokens), x = x_side(work, sample, group, tokens);
  grad.scale = grad_scale;
  x.scale = x_scale;
  Sum sums[kMicro][kMicro] = {};
  multiply<Sum, kMicro, kPatches>(grad, x, row * kTile, column * kTile, memory, sums);
  double total = 0;
  for_each_element<kMicro>(grad.channels - row * kTile, x.channels - column * kTile,
                           [&](int i, int j) { total = add_product(total, sums[i][j], sums[i][j]); });
  return total;
}

// A block per sample and tile of its weight gradient. 64 sums a thread leave room for one block on a multiprocessor.
template <class Sum, int kMicro, bool kPatches>
__global__ void __launch_bounds__(kThreads, kMicro > 4 ? 1 : 2)
    tiles(const __grid_constant__ Work work, double* partials) {
  __shared__ Memory<Sum, kMicro> memory;
  const Block team{&memory.storage};
  for (int64_t task = blockIdx.x; task < work.norms.samples * work.units; task += gridDim.x) {
    int64_t unit;
    const int64_t sample = divide(task, work.units, &unit);
    const RowRange tokens = tokens_of(work.norms, sample);
    const double mine = tile_squares<Sum, kMicro, kPatches>(work, sample, unit, tokens, 1, 1, memory);
    const double total = team.sum(mine);
    if (threadIdx.x == 0) partials[task] = total;
  }
}

// A block per tile of the batch's weight gradient: every sample's tile is made, squared and added to it in turn.
template <class Sum, int kMicro>
__global__ void __launch_bounds__(kThreads, 2) total_tiles(const __grid_constant__ Work work, double* partials) {
  constexpr int kTile = kSide * kMicro;
  __shared__ Memory<Sum, kMicro> memory;
  const WeightNorms& norms = work.norms;
  const Block team{&memory.storage};
  const auto thread = static_cast<int>(threadIdx.x), down = thread / kSide, across = thread % kSide;
  const bool valid = offsets_ascend(norms.samples, norms.shape.out[2], norms.offsets, team);
  for (int64_t unit = blockIdx.x; unit < work.units; unit += gridDim.x) {
    int64_t column;
    const int64_t row = divide(unit, (work.columns + kTile - 1) / kTile, &column) * kTile;
    column *= kTile;
    Sum total[kMicro][kMicro] = {};
    const int64_t rows = norms.shape.outputs - row, columns = work.columns - column;
    for (int64_t sample = 0; sample < norms.samples; ++sample) {
      const RowRange tokens = tokens_of(norms, sample);
      Sum sums[kMicro][kMicro] = {};
      multiply<Sum, kMicro, false>(grad_side(work, sample, 0, tokens), x_side(work, sample, 0, tokens), row, column,
                                   memory, sums);
      double squares = 0;
      for_each_element<kMicro>(rows, columns, [&](int i, int j) {
        squares = add_product(squares, sums[i][j], sums[i][j]);
        total[i][j] += sums[i][j];
      });
      squares = team.sum(squares);
      if (thread == 0) partials[sample * work.units + unit] = squares;
    }
    auto* to = static_cast<Sum*>(norms.total);
    for_each_element<kMicro>(rows, columns, [&](int i, int j) {
      to[(row + element_of(down, i)) * norms.total_stride + column + element_of(across, j)] =
          valid ? total[i][j] : static_cast<Sum>(nan(""));
    });
  }
}

// Tokens as channels and features as positions.
__device__ __forceinline__ Side transposed(Side side) {
  const int64_t tokens = side.positions, token = side.along[2];
  side.positions = side.channels;
  side.along[2] = side.channel;
  side.channels = tokens;
  side.channel = token;
  side.runs = !side.runs;
  return side;
}

// A block per sample and pair of tiles of tokens, the second not behind the first.
template <class Sum, int kMicro>
__global__ void __launch_bounds__(kThreads, 2) gram_tiles(const __grid_constant__ Work work, double* partials) {
  constexpr int kTile = kSide * kMicro;
  __shared__ Memory<Sum, kMicro> memory;
  const Block team{&memory.storage};
  const auto thread = static_cast<int>(threadIdx.x), down = thread / kSide, across = thread % kSide;
  for (int64_t task = blockIdx.x; task < work.norms.samples * work.units; task += gridDim.x) {
    int64_t rest;
    const int64_t sample = divide(task, work.units, &rest);
    const RowRange tokens = tokens_of(work.norms, sample);
    int64_t row = 0;
    for (; rest > row; ++row) rest -= row + 1;
    const Side x = transposed(x_side(work, sample, 0, tokens)), grad = transposed(grad_side(work, sample, 0, tokens));
    Sum of_x[kMicro][kMicro] = {}, of_grad[kMicro][kMicro] = {};
    multiply<Sum, kMicro, false>(x, x, row * kTile, rest * kTile, memory, of_x);
    multiply<Sum, kMicro, false>(grad, grad, row * kTile, rest * kTile, memory, of_grad);
    GramSums sums{};
    const auto add = [&](int i, int j) {
      sums.total = add_product(sums.total, of_x[i][j], of_grad[i][j]);
      if (row != rest || element_of(down, i) != element_of(across, j)) return;
      sums.diagonal = add_product(sums.diagonal, of_x[i][j], of_grad[i][j]);
      sums.x += static_cast<double>(of_x[i][j]);
      sums.grad += static_cast<double>(of_grad[i][j]);
    };
    for_each_element<kMicro>(tokens.count - row * kTile, tokens.count - rest * kTile, add);
    if (row != rest) sums.total *= 2;
    double* to = partials + task * work.parts;
    double each[4] = {sums.total, sums.diagonal, sums.x, sums.grad};
    for (int part = 0; part < 4; ++part) {
      const double total = team.sum(each[part]);
      if (threadIdx.x == 0) to[part] = total;
    }
  }
}

// The largest |element| of a sample; infinity where one is not finite.
__device__ double largest_of(const Factor& factor, const WeightNorms& norms, int64_t sample, int64_t channels,
                             const int64_t (&size)[3], RowRange tokens, Block team) {
  const void* data = start_of(factor, norms, sample, 0, tokens);
  const int64_t places = norms.offsets ? tokens.count : size[0] * size[1] * size[2];
  double largest = 0;
  with_dtype(factor.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* from = static_cast<const typename E::Stored*>(data);
    for (int64_t i = threadIdx.x; i < channels * places; i += kThreads) {
      int64_t channel, height, width, rest = i;
      rest = divide(rest, channels, &channel);
      int64_t depth = 0;
      height = 0;
      if (norms.offsets) {
        width = rest;
      } else {
        rest = divide(rest, size[2], &width);
        depth = divide(rest, size[1], &height);
      }
      const double x = fabs(static_cast<double>(E::widen(from[channel * factor.channel + depth * factor.along[0] +
                                                              height * factor.along[1] + width * factor.along[2]])));
      largest = x <= largest ? largest : isfinite(x) ? x : kInfinity;
    }
  });
  return team.max(largest);
}

__device__ __forceinline__ int exponent_for(double largest) {
  if (largest == 0 || !isfinite(largest)) return 0;
  const int exponent = -ilogb(largest);
  return exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
}

// The squared norm in float64, with scaled factors.
__device__ double exact_squares(const Work& work, int64_t sample, RowRange tokens, Memory<double, 4>& memory) {
  const WeightNorms& norms = work.norms;
  const ConvShape& shape = norms.shape;
  const Block team{&memory.storage};
  const double of_x = largest_of(norms.x, norms, sample, shape.groups * shape.inputs, shape.size, tokens, team);
  const double of_grad = largest_of(norms.grad, norms, sample, shape.groups * shape.outputs, shape.out, tokens, team);
  if ((of_x == 0 && isfinite(of_grad)) || (of_grad == 0 && isfinite(of_x))) return 0;
  const int x_exponent = exponent_for(of_x), grad_exponent = exponent_for(of_grad);
  constexpr int kTile = kSide * 4;
  const int64_t units = shape.groups * ((shape.outputs + kTile - 1) / kTile) * ((work.columns + kTile - 1) / kTile);
  double mine = 0;
  for (int64_t unit = 0; unit < units; ++unit)
    mine += tile_squares<double, 4, true>(work, sample, unit, tokens, ldexp(1.0, x_exponent), ldexp(1.0, grad_exponent),
                                          memory);
  return ldexp(team.sum(mine), -2 * (x_exponent + grad_exponent));
}

// Below this a sum of squares of float32 (float64) sums may have lost digits to underflow.
__device__ __forceinline__ double safe_sum(const Work& work) {
  const ConvShape& shape = work.norms.shape;
  return static_cast<double>(shape.groups * shape.outputs) * static_cast<double>(work.columns) *
         (work.wide ? 1e-290 : 1e-44);
}

// A block per sample: adds up its partial sums, or takes what is in out where there are none; makes again what cannot
// be trusted.
__global__ void __launch_bounds__(kThreads, 2)
    finish_tiles(const __grid_constant__ Work work, const double* partials, double* out) {
  __shared__ Memory<double, 4> memory;
  const WeightNorms& norms = work.norms;
  const Block team{&memory.storage};
  const bool valid = offsets_ascend(norms.samples, norms.shape.out[2], norms.offsets, team);
  for (int64_t sample = blockIdx.x; sample < norms.samples; sample += gridDim.x) {
    const RowRange tokens = tokens_of(norms, sample);
    GramSums sums{out[sample], 0, 0, 0};
    if (partials) {
      double each[4] = {0, 0, 0, 0};
      for (int part = 0; part < work.parts; ++part) {
        for (int64_t unit = threadIdx.x; unit < work.units; unit += kThreads)
          each[part] += partials[(sample * work.units + unit) * work.parts + part];
        each[part] = team.sum(each[part]);
      }
      sums = {each[0], each[1], each[2], each[3]};
    }
    double total = sums.total;
    const bool holds = norms.gram
                           ? gram_holds(sums, static_cast<double>(tokens.count), static_cast<double>(work.columns),
                                        static_cast<double>(norms.shape.outputs), work.wide)
                           : isfinite(total) && total >= safe_sum(work);
    if (tokens.count == 0 || work.columns == 0 || norms.shape.outputs == 0)
      total = 0;
    else if (!holds)
      total = exact_squares(work, sample, tokens, memory);
    __syncthreads();  // out may have been read above
    if (threadIdx.x == 0) out[sample] = valid ? total : nan("");
  }
}

constexpr int64_t cut(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

bool is_flat(const int64_t (&along)[3], const int64_t (&size)[3]) {
  const bool rows = size[1] == 1 || along[1] == along[2] * size[2];
  return rows && (size[0] == 1 || along[0] == along[2] * size[2] * size[1]);
}

// With few channels tiles of 64 waste less than those of 128 gain.
bool is_large(const Work& work) {
  return !work.wide && !work.norms.total && work.norms.shape.outputs > 64 && work.columns > 64;
}

Work work_of(const WeightNorms& norms) {
  const ConvShape& shape = norms.shape;
  Work work{norms};
  int64_t taps = 1;
  bool plain = true;
  for (int d = 0; d < 3; ++d) {
    taps *= shape.kernel[d];
    plain =
        plain && shape.kernel[d] == 1 && shape.stride[d] == 1 && shape.padding[d] == 0 && shape.size[d] == shape.out[d];
  }
  work.columns = shape.inputs * taps;
  work.wide = norms.x.dtype == DType::kFloat64 || norms.grad.dtype == DType::kFloat64;
  work.x_flat = plain && is_flat(norms.x.along, shape.size);
  work.grad_flat = is_flat(norms.grad.along, shape.out);
  work.x_runs = norms.x.along[2] == 1 && norms.x.channel != 1;
  work.grad_runs = norms.grad.along[2] == 1 && norms.grad.channel != 1;
  const int64_t tile = kSide * (is_large(work) ? 8 : 4);
  const int64_t tokens = cut(shape.out[2], kSide * 4);
  work.units =
      norms.gram ? tokens * (tokens + 1) / 2 : shape.groups * cut(shape.outputs, tile) * cut(work.columns, tile);
  work.parts = norms.gram ? 4 : 1;
  return work;
}

template <class Sum, int kMicro>
Status launch_tiles(const Work& work, double* partials, void* stream) {
  const int64_t blocks = blocks_for(work.norms.samples * work.units);
  const char* doing = "squaring weight gradients";
  if (work.x_flat && work.grad_flat) return launch(doing, &tiles<Sum, kMicro, false>, blocks, stream, work, partials);
  return launch(doing, &tiles<Sum, kMicro, true>, blocks, stream, work, partials);
}

Status launch_products(const Work& work, double* partials, void* stream) {
  if (work.norms.gram) {
    const int64_t blocks = blocks_for(work.norms.samples * work.units);
    const char* doing = "multiplying Gram matrices";
    return work.wide ? launch(doing, &gram_tiles<double, 4>, blocks, stream, work, partials)
                     : launch(doing, &gram_tiles<float, 4>, blocks, stream, work, partials);
  }
  if (work.norms.total) {
    const int64_t blocks = blocks_for(work.units);
    const char* doing = "making a weight gradient";
    return work.wide ? launch(doing, &total_tiles<double, 4>, blocks, stream, work, partials)
                     : launch(doing, &total_tiles<float, 4>, blocks, stream, work, partials);
  }
  if (work.wide) return launch_tiles<double, 4>(work, partials, stream);
  return is_large(work) ? launch_tiles<float, 8>(work, partials, stream)
                        : launch_tiles<float, 4>(work, partials, stream);
}

Status finish(const Work& work, const double* partials, double* out, void* stream) {
  return launch("adding up weight gradients' squares", &finish_tiles, blocks_for(work.norms.samples), stream, work,
                partials, out);
}

}  // namespace

int64_t weight_norms_scratch(const WeightNorms& norms) {
  const Work work = work_of(norms);
  return norms.samples * work.units * work.parts;
}

Status weight_norms(const WeightNorms& norms, double* out, double* scratch, void* stream) {
  const Work work = work_of(norms);
  if (work.units > 0 && (norms.samples > 0 || norms.total)) {  // the total of no samples is zero
    const Status status = launch_products(work, scratch, stream);
    if (status.code) return status;
  }
  if (!norms.samples) return {0, ""};
  return finish(work, scratch, out, stream);
}

Status redo_weight_norms(const WeightNorms& norms, double* out, void* stream) {
  if (!norms.samples) return {0, ""};
  return finish(work_of(norms), nullptr, out, stream);
}

}  // namespace lipcore::cuda
