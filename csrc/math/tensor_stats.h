// What is said of a tensor's elements: count, mean, sums of the 2nd to 4th powers of deviations, extremes, zeros and
// non-finite elements, by the one-pass update and the merge of Pebay (2008), which are Chan's for the first two. Beside
// them a histogram of magnitudes. Host and device. One of zeros is the identity of merge.
#pragma once

#include "math/log_bins.h"

namespace lipcore {

struct TensorStats {
  double count;  // finite elements; the others enter nothing but the last field
  double mean;
  double m2, m3, m4;  // sum (x - mean)^k
  double min, max;    // meaningless while count == 0
  double zeros;
  double nonfinite;
};
constexpr int kTensorStats = 9;
static_assert(sizeof(TensorStats) == kTensorStats * sizeof(double), "a row of float64 numbers");

// Bins of log_bins.h, sixteen at a time: eight per power of two, so that a tensor's histogram takes 16 KiB.
constexpr int kBinsTogether = 16;
constexpr int kTensorBins = kBins / kBinsTogether;
constexpr int kTensorBinShift = 23 - kBinBits + 4;
static_assert(1 << 4 == kBinsTogether && kTensorBins == 1 << (31 - kTensorBinShift), "bits of a float32");

// Of a finite element. Float32's largest value has its own bin, which bin_of() would put above float32's range.
LIPCORE_INLINE int tensor_bin_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<int>((bits & 0x7fffffffu) >> kTensorBinShift);
}
LIPCORE_INLINE int tensor_bin_of(double x) {
  const double size = x < 0 ? -x : x;
  return tensor_bin_of(size <= 3.4028234663852886e38 ? static_cast<float>(size) : float_from_bits(0x7f800000u));
}

// The least magnitude in a bin.
LIPCORE_INLINE double tensor_bin_low(int bin) { return bin_low(bin * kBinsTogether); }

LIPCORE_INLINE void merge(TensorStats* into, const TensorStats& from) {
  into->zeros += from.zeros;
  into->nonfinite += from.nonfinite;
  if (from.count == 0) return;
  if (into->count == 0) {
    const double zeros = into->zeros, nonfinite = into->nonfinite;
    *into = from;
    into->zeros = zeros;
    into->nonfinite = nonfinite;
    return;
  }
  const double a = into->count, b = from.count, n = a + b;
  const double d = from.mean - into->mean, d_n = d / n, product = a * b * d * d_n;
  into->m4 += from.m4 + product * d_n * d_n * (a * a - a * b + b * b) +
              6 * d_n * d_n * (a * a * from.m2 + b * b * into->m2) + 4 * d_n * (a * from.m3 - b * into->m3);
  into->m3 += from.m3 + product * d_n * (a - b) + 3 * d_n * (a * from.m2 - b * into->m2);
  into->m2 += from.m2 + product;
  into->mean += d_n * b;
  into->min = from.min < into->min ? from.min : into->min;
  into->max = from.max > into->max ? from.max : into->max;
  into->count = n;
}

LIPCORE_INLINE void observe(TensorStats* stats, double x) {
  const bool finite = x - x == 0;
  merge(stats,
        finite ? TensorStats{1, x, 0, 0, 0, x, x, x == 0 ? 1.0 : 0.0, 0} : TensorStats{0, 0, 0, 0, 0, 0, 0, 0, 1});
}

}  // namespace lipcore
