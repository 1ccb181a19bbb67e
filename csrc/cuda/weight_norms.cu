// Norms of weight gradients that are sums of outer products over positions, of Linear layers and convolutions, without
// the gradients: weight_tiles.cuh says how. Products and sums over positions are float32 (float64 where an input is),
// squares float64; relative error about 1e-7 sqrt(positions). What left the range of float32, or cancelled in the Gram
// form, is made again in float64, scaled by powers of two, by the block that sees it.
#include <limits>

#include "cuda/fma_product.cuh"
#include "cuda/weight_tiles.cuh"
#include "math/weight_cost.h"

namespace lipcore::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Exact = FmaProduct<double, 4>;

constexpr int64_t cut(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

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
__device__ double exact_squares(const WeightWork& work, int64_t sample, RowRange tokens, Exact::Memory& memory) {
  const WeightNorms& norms = work.norms;
  const ConvShape& shape = norms.shape;
  const Block team{&memory.storage};
  const double of_x = largest_of(norms.x, norms, sample, shape.groups * shape.inputs, shape.size, tokens, team);
  const double of_grad = largest_of(norms.grad, norms, sample, shape.groups * shape.outputs, shape.out, tokens, team);
  if ((of_x == 0 && isfinite(of_grad)) || (of_grad == 0 && isfinite(of_x))) return 0;
  const int x_exponent = exponent_for(of_x), grad_exponent = exponent_for(of_grad);
  constexpr int kTile = Exact::kTile;
  const int64_t units = shape.groups * ((shape.outputs + kTile - 1) / kTile) * ((work.columns + kTile - 1) / kTile);
  double mine = 0;
  for (int64_t unit = 0; unit < units; ++unit)
    mine += tile_squares<Exact, true>(work, {sample, unit, tokens}, ldexp(1.0, x_exponent), ldexp(1.0, grad_exponent),
                                      memory);
  return ldexp(team.sum(mine), -2 * (x_exponent + grad_exponent));
}

// Below this a sum of squares of float32 (float64) sums may have lost digits to underflow.
__device__ __forceinline__ double safe_sum(const WeightWork& work) {
  const ConvShape& shape = work.norms.shape;
  return static_cast<double>(shape.groups * shape.outputs) * static_cast<double>(work.columns) *
         (work.wide ? 1e-290 : 1e-44);
}

// A block per sample: adds up its partial sums, or takes what is in out where there are none; makes again what cannot
// be trusted.
__global__ void __launch_bounds__(kThreads, 2)
    finish_tiles(const __grid_constant__ WeightWork work, const double* partials, double* out) {
  __shared__ Exact::Memory memory;
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
    const bool holds =
        norms.gram ? gram_holds(sums, static_cast<double>(norms.shape.groups * tokens.count),
                                static_cast<double>(work.columns), static_cast<double>(norms.shape.outputs), work.wide)
                   : isfinite(total) && total >= safe_sum(work);
    if (tokens.count == 0 || work.columns == 0 || norms.shape.outputs == 0)
      total = 0;
    else if (!holds)
      total = exact_squares(work, sample, tokens, memory);
    __syncthreads();  // out may have been read above
    if (threadIdx.x == 0) out[sample] = valid ? total : nan("");
  }
}

bool is_flat(const int64_t (&along)[3], const int64_t (&size)[3]) {
  const bool rows = size[1] == 1 || along[1] == along[2] * size[2];
  return rows && (size[0] == 1 || along[0] == along[2] * size[2] * size[1]);
}

constexpr int64_t kVector = 8;

// Whether neighbours of a factor can be copied eight at a time wherever a sample, a group, a row of them begins.
bool has_vectors(const Factor& factor, bool runs, int64_t groups, int64_t channels, bool packed) {
  if (runs) return !packed && factor.channel % kVector == 0;
  return factor.channel == 1 && factor.along[2] % kVector == 0 && (groups == 1 || channels % kVector == 0);
}

// Whether channels of patches can be: eight of them belong to one pixel then.
bool has_pixels(const Factor& factor, const int64_t (&size)[3], int64_t channels) {
  for (int d = 0; d < 3; ++d)
    if (size[d] > 1 && factor.along[d] % kVector) return false;
  return factor.channel == 1 && channels % kVector == 0;
}

Layout layout_of(const WeightNorms& norms, const Factor& factor, bool flat, int64_t channels, bool patches) {
  const ConvShape& shape = norms.shape;
  const bool runs = factor.along[2] == 1 && factor.channel != 1;
  const bool aligned = item_size(factor.dtype) == 2 && reinterpret_cast<uintptr_t>(factor.data) % 16 == 0 &&
                       factor.sample % kVector == 0;
  const bool vectors = flat      ? has_vectors(factor, runs, shape.groups, channels, norms.offsets != nullptr)
                       : patches ? has_pixels(factor, shape.size, channels)
                                 : false;
  return {flat, runs, aligned && vectors};
}

// With few channels or tiles, tiles of 64 waste less than those of 128 gain. Registers do not hold two large sets of
// sums: both Gram matrices, or on the way without tensor cores a sample's sums and the batch's.
int64_t tile_of(const WeightWork& work) {
  const ConvShape& shape = work.norms.shape;
  if (work.norms.gram || work.wide || shape.outputs <= 64 || work.columns <= 64) return 64;
  if (!work.norms.total) return 128;
  return work.tensor_cores && cut(shape.outputs, 128) * cut(work.columns, 128) >= kManyTiles ? 128 : 64;
}

WeightWork work_of(const WeightNorms& norms) {
  const ConvShape& shape = norms.shape;
  WeightWork work{norms};
  int64_t taps = 1;
  bool plain = true;
  for (int d = 0; d < 3; ++d) {
    taps *= shape.kernel[d];
    plain =
        plain && shape.kernel[d] == 1 && shape.stride[d] == 1 && shape.padding[d] == 0 && shape.size[d] == shape.out[d];
  }
  work.columns = shape.inputs * taps;
  work.wide = norms.x.dtype == DType::kFloat64 || norms.grad.dtype == DType::kFloat64;
  work.tensor_cores = norms.tensor_cores && norms.x.dtype == norms.grad.dtype && item_size(norms.x.dtype) == 2;
  work.x = layout_of(norms, norms.x, plain && is_flat(norms.x.along, shape.size), shape.inputs, true);
  work.grad = layout_of(norms, norms.grad, is_flat(norms.grad.along, shape.out), shape.outputs, false);
  const int64_t tile = work.tile = tile_of(work), tokens = cut(shape.out[0] * shape.out[1] * shape.out[2], tile);
  work.units =
      shape.groups * (norms.gram ? tokens * (tokens + 1) / 2 : cut(shape.outputs, tile) * cut(work.columns, tile));
  work.parts = norms.gram ? 4 : 1;
  return work;
}

Status launch_products(const WeightWork& work, double* partials, void* stream) {
  if (work.tensor_cores) return launch_mma_tiles(work, partials, stream);
  if (work.wide) return launch_tiles<Exact>(work, partials, stream);
  return work.tile > 64 ? launch_tiles<FmaProduct<float, 8>>(work, partials, stream)
                        : launch_tiles<FmaProduct<float, 4>>(work, partials, stream);
}

Status finish(const WeightWork& work, const double* partials, double* out, void* stream) {
  return launch("adding up weight gradients' squares", &finish_tiles, blocks_for(work.norms.samples), stream, work,
                partials, out);
}

}  // namespace

int64_t weight_norms_scratch(const WeightNorms& norms) {
  const WeightWork work = work_of(norms);
  return norms.samples * work.units * work.parts;
}

Status weight_norms(const WeightNorms& norms, double* out, double* scratch, void* stream) {
  const WeightWork work = work_of(norms);
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
