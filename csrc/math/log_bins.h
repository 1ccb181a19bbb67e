// Bins of a quantile histogram for values >= 0, from the exponent and the top mantissa bits of the value as a float32:
// 128 bins per power of two, so a bin is at most 1/128 of its value wide and its middle is within 0.4 % of every value
// in it. Merging two histograms adds integers and is exact. Host and device.
#pragma once

#include "math/dtype.h"

namespace lipcore {

constexpr int kBinBits = 7;
constexpr int kBinsPerPage = 1 << kBinBits;  // a page is one power of two
constexpr int kPages = 256;                  // float32 exponents; page 255 holds what is above float32's range
constexpr int kBins = kPages * kBinsPerPage;

// x >= 0. Values above float32's range share the last page. Below 2^-126 a bin is as wide as the smallest bin above it,
// so that its middle is no longer within 0.4 %; values below 2^-133 share bin 0 with zero.
LIPCORE_INLINE int bin_of(double x) {
  // + 0 takes the sign off -0, which would be a bin far outside.
  const float rounded = x < 3.4028234663852886e38 ? static_cast<float>(x) + 0.0f : float_from_bits(0x7f800000u);
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  return static_cast<int>(bits >> (23 - kBinBits));
}

LIPCORE_INLINE double bin_low(int bin) {
  return static_cast<double>(float_from_bits(static_cast<uint32_t>(bin) << (23 - kBinBits)));
}

LIPCORE_INLINE double bin_middle(int bin) {
  if (bin == 0) return 0;
  const double low = bin_low(bin);
  return bin + 1 < (kPages - 1) * kBinsPerPage ? 0.5 * (low + bin_low(bin + 1)) : low;
}

}  // namespace lipcore
