// Which way of making norms of per-sample weight gradients is cheapest, from shapes alone: one rule for Linear layers
// and convolutions on all devices. Operators ask it, and through the bindings Python where that chooses and where it
// says what will be chosen. A cost is a time in multiplications of float32 numbers without tensor cores.
// From which length on fused=True has the norms made beside the gradient: lipcore/capture/layers/fused_linear.py.
//
// A gradient is a sum over positions (tokens, places of a convolution's output) of inputs times outputs; of a
// convolution, inputs are channels at every tap of the kernel. Patches are never unfolded into memory: by the rates
// below torch's product of unfolded 16-bit ones is the cheapest where 600 / positions + 600 / outputs < 1, which is
// hardly any layer's.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "math/conv_shape.h"

namespace lipcore {

// The Gram form costs this share of the direct one at most where it is taken, since it cancels; short sequences fill
// its tiles badly.
constexpr double kGramShare = 0.6, kGramShareOfShort = 0.45;
constexpr int kShortSequence = 64;

// Of data sheets: a multiplication on tensor cores takes 1/15 (H100) to 1/2 (RTX 4090) of one without, and to write an
// element of a product and read it again as long as 100 to 130 of those.
constexpr double kTensorCoreTime = 1.0 / 8, kProductTime = 100;
// What lipcore's products on tensor cores reach of torch's, which use what each device has for itself. Not measured.
constexpr double kReachedOfTorch = 0.6;
// From as many multiplications on torch may be asked: its launches and products cost more than all of fewer.
constexpr double kManyMultiplications = 1 << 27;

// A CUDA device's blocks make a tile of a gradient each. So many are enough for the multiprocessors of a large device.
constexpr int64_t kManyTiles = 128, kSmallTile = 64;

// Of a CPU's Gram form of a convolution: the share of the direct one, since its tiles are smaller and it cancels; the
// time of a product of two pixels that is added up once per tap, from memory; and the most elements of both matrices of
// a sample, which should stay in a core's cache.
constexpr double kPixelGramShare = 0.4, kCombineTime = 3;
constexpr double kPixelGramElements = 1 << 20;

// A CUDA device multiplies whole tiles of 64 x 64, of which it takes so many products at a time.
constexpr double kDeviceTile = 64, kDeviceDepth = 16;

// What it takes to rearrange memory for lanes of groups and samples.
constexpr double kRearranged = 1.3;

// Whether a CUDA device multiplies no more for Gram matrices than for gradients, by the tiles that it fills up: of the
// former those on and above the diagonal.
inline bool gram_has_fewer_tiles(double positions, double inputs, double outputs) {
  const auto whole = [](double length, double piece) { return std::ceil(length / piece) * piece; };
  const double rows = whole(positions, kDeviceTile), pairs = rows * (rows + kDeviceTile) / 2;
  return pairs * (whole(inputs, kDeviceDepth) + whole(outputs, kDeviceDepth)) <=
         whole(positions, kDeviceDepth) * whole(inputs, kDeviceTile) * whole(outputs, kDeviceTile);
}

// Whether the Gram matrices of `positions` positions are multiplied, rather than inputs with gradients.
inline bool gram_is_cheaper(double positions, double inputs, double outputs, bool on_cpu) {
  const double ratio = positions * (inputs + outputs) / (2 * inputs * outputs);
  return ratio < (positions <= kShortSequence ? kGramShareOfShort : kGramShare) &&
         (on_cpu || gram_has_fewer_tiles(positions, inputs, outputs));
}
inline bool gram_is_cheaper(int64_t positions, int64_t inputs, int64_t outputs, bool on_cpu) {
  return gram_is_cheaper(static_cast<double>(positions), static_cast<double>(inputs), static_cast<double>(outputs),
                         on_cpu);
}

// First and last numbers of positions for which that is so.
inline std::vector<std::pair<int64_t, int64_t>> gram_lengths(int64_t inputs, int64_t outputs, bool on_cpu) {
  constexpr int64_t kTile = static_cast<int64_t>(kDeviceTile), kTiles = 8, kLongest = int64_t{1} << 40;
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t first = 1, last = kTile; first < kLongest;) {
    int64_t least = first - 1, most = last;  // up to which positions a CPU would
    while (least < most) {
      const int64_t middle = least + (most - least + 1) / 2;
      if (gram_is_cheaper(middle, inputs, outputs, true))
        least = middle;
      else
        most = middle - 1;
    }
    // Within a tile a device does from some number of positions on; so many tiles never are more than a gradient's.
    while (first <= most && !gram_is_cheaper(first, inputs, outputs, on_cpu)) ++first;
    if (first <= most && !found.empty() && found.back().second + 1 == first)
      found.back().second = most;
    else if (first <= most)
      found.emplace_back(first, most);
    first = last + 1;
    last = last < kTiles * kTile ? last + kTile : kLongest;
  }
  return found;
}

// The same of a convolution. A CUDA device multiplies patches, read in place, as if they were tokens; a CPU multiplies
// pixels and adds the products of a patch up, tap by tap.
inline bool gram_is_cheaper(const ConvShape& shape, bool on_cpu) {
  double pixels = 1, padded = 1, positions = 1, taps = 1;
  for (int d = 0; d < 3; ++d) {
    pixels *= static_cast<double>(shape.size[d]);
    padded *= static_cast<double>(shape.size[d]) + 2 * static_cast<double>(shape.padding[d]);
    positions *= static_cast<double>(shape.out[d]);
    taps *= static_cast<double>(shape.kernel[d]);
  }
  const double inputs = static_cast<double>(shape.inputs), outputs = static_cast<double>(shape.outputs);
  if (!on_cpu) return gram_is_cheaper(positions, inputs * taps, outputs, on_cpu);
  if (padded * (padded + positions) > kPixelGramElements) return false;
  const double gram =
      (inputs * pixels * pixels + outputs * positions * positions + kCombineTime * taps * positions * padded) / 2;
  return gram < kPixelGramShare * (inputs * taps * outputs * positions);
}

// Whether a CPU's direct form of a convolution fills the lanes of its vectors with `units` groups of all samples,
// rather than with the outputs of one.
inline bool lanes_are_cheaper(int64_t outputs, int64_t units, int64_t lanes) {
  const auto vectors = [&](int64_t count) { return static_cast<double>((count + lanes - 1) / lanes); };
  const double by_lanes = vectors(units) / static_cast<double>(units) * static_cast<double>(outputs);
  return kRearranged * by_lanes < vectors(outputs);
}

// Whether torch had better make products of 16-bit numbers on a CUDA device and hand them over to be squared: where
// there are many, and the kernel, which writes none of them, would take more time all the same.
inline bool torch_is_cheaper(int64_t samples, int64_t tokens, int64_t inputs, int64_t outputs, bool tensor_cores) {
  const double t = static_cast<double>(tokens), i = static_cast<double>(inputs), o = static_cast<double>(outputs);
  if (static_cast<double>(samples) * t * i * o < kManyMultiplications) return false;
  const double time = tensor_cores ? kTensorCoreTime / kReachedOfTorch : 1;
  // Both Gram matrices are symmetric.
  const double kernel = gram_is_cheaper(tokens, inputs, outputs, false) ? t * (t + 1) * (i + o) : 2 * t * i * o;
  return kernel * time > (2 * t * kTensorCoreTime + kProductTime) * i * o;
}

// Whether a CUDA device had better make a Linear layer's gradient and its norms in one pass, a tile of all samples per
// block: where there are blocks enough.
inline bool one_pass_is_cheaper(int64_t inputs, int64_t outputs) {
  return static_cast<double>(inputs) * static_cast<double>(outputs) >=
         static_cast<double>(kManyTiles * kSmallTile * kSmallTile);
}

// Whether inner products of all samples' gradients are made of the products of pairs of their `rows` rows, rather than
// of the gradients.
inline bool pairs_are_cheaper(int64_t rows, int64_t samples, int64_t inputs, int64_t outputs) {
  const double n = static_cast<double>(rows), b = static_cast<double>(samples);
  const double i = static_cast<double>(inputs), o = static_cast<double>(outputs);
  return n * n * (i + o) <= i * o * (n + b * b);
}

}  // namespace lipcore
