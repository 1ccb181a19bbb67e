// Norms of gradients that are sums over rows: biases and the affine part of normalisations.
#pragma once

#include "ops/offsets.h"
#include "python/tensor_view.h"

namespace lipcore {

enum class Terms { kShift = 0, kScale = 1, kBoth = 2 };
constexpr int kTerms = 3;

struct Normalizer {
  double eps;   // >= 0, added to the mean square
  bool center;  // the row's mean is taken off first
};

// Squared norms of sum_t g_bt (kShift), sum_t g_bt * x_bt (kScale), or scale and shift (kBoth, in this order).
// grad [B, T, F], or [1, N, F] with offsets; on the CPU either its rows or its columns are flat runs. x is of the same
// shape, dtype and orientation; null for kShift. out float64 [1 or 2, B]. All on one device.
// With a normalizer, on the CPU, x is the input of a norm layer, whose rows are flat runs and normalised here.
bool row_sum_norms(const TensorView& grad, const TensorView* x, Offsets offsets, Terms terms, const TensorView& out,
                   const Normalizer* normalizer = nullptr);

}  // namespace lipcore
