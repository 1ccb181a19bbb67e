// Which way of making norms of a Linear layer's per-sample weight gradients is cheapest, from shapes alone: one rule
// for all devices. A cost is a time in multiplications of float32 numbers without tensor cores.
#pragma once

#include <cstdint>

namespace lipcore {

// The Gram form costs this share of the direct one at most where it is taken, since it cancels; short sequences fill
// its tiles badly.
constexpr double kGramShare = 0.6, kGramShareOfShort = 0.45;
constexpr int64_t kShortSequence = 64;

// Of data sheets: a multiplication on tensor cores takes 1/15 (H100) to 1/2 (RTX 4090) of one without, and to write an
// element of a product and read it again as long as 100 to 130 of those.
constexpr double kTensorCoreTime = 1.0 / 8, kProductTime = 100;
// What lipcore's products on tensor cores reach of torch's, which use what each device has for itself. Not measured.
constexpr double kReachedOfTorch = 0.6;
// From as many multiplications on torch may be asked: its launches and products cost more than all of fewer.
constexpr double kManyMultiplications = 1 << 27;

// Whether the Gram matrices of `tokens` tokens are multiplied, rather than inputs with gradients.
inline bool gram_is_cheaper(int64_t tokens, int64_t inputs, int64_t outputs) {
  const double i = static_cast<double>(inputs), o = static_cast<double>(outputs);
  const double ratio = static_cast<double>(tokens) * (i + o) / (2 * i * o);
  return ratio < (tokens <= kShortSequence ? kGramShareOfShort : kGramShare);
}

// Whether torch had better make products of 16-bit numbers on a CUDA device and hand them over to be squared: where
// there are many, and the kernel, which writes none of them, would take more time all the same.
inline bool torch_is_cheaper(int64_t samples, int64_t tokens, int64_t inputs, int64_t outputs, bool tensor_cores) {
  const double t = static_cast<double>(tokens), i = static_cast<double>(inputs), o = static_cast<double>(outputs);
  if (static_cast<double>(samples) * t * i * o < kManyMultiplications) return false;
  const double time = tensor_cores ? kTensorCoreTime / kReachedOfTorch : 1;
  // Both Gram matrices are symmetric.
  const double kernel = gram_is_cheaper(tokens, inputs, outputs) ? t * (t + 1) * (i + o) : 2 * t * i * o;
  return kernel * time > (2 * t * kTensorCoreTime + kProductTime) * i * o;
}

}  // namespace lipcore
