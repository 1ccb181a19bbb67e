// Sums of squares over flat runs. Built once per instruction set.
// Every element is squared in float64: a float32 square is exact there and neither overflows nor underflows, so a
// gradient of 1e-24 (a saturated sigmoid) keeps its norm. Error <= 2e-16 per 16 elements summed in a lane: about 1e-13
// at 2^26.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

template <class E>
LIPCORE_INLINE double sum_squares_of(E, const void* data, int64_t count) {
  using Stored = typename E::Stored;
  const auto* x = static_cast<const Stored*>(data);
  const int64_t full = count & ~int64_t{15};
  Stored tail[16];
  if (full < count) {  // first of all: a call below would drive the sums out of their registers
    memset(tail, 0, sizeof tail);
    memcpy(tail, x + full, static_cast<size_t>(count - full) * sizeof tail[0]);
  }
  // Four independent sums hide the latency of the addition. Not an array, which would live in memory.
  F64x16 a = f64(0), b = f64(0), c = f64(0), d = f64(0);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    a = add_square(a, E::read(x + i));
    b = add_square(b, E::read(x + i + 16));
    c = add_square(c, E::read(x + i + 32));
    d = add_square(d, E::read(x + i + 48));
  }
  const auto rest = [&](F64x16 sum, int64_t at) {
    if (at < full) return add_square(sum, E::read(x + at));
    return at < count ? add_square(sum, E::read(tail)) : sum;
  };
  if (i < count) {
    a = rest(a, i);
    b = rest(b, i + 16);
    c = rest(c, i + 32);
    d = rest(d, i + 48);
  }
  return sum_lanes((a + b) + (c + d));
}

double sum_squares(const void* x, DType dtype, int64_t count) {
  return with_dtype(dtype, [&](auto element) { return sum_squares_of(element, x, count); });
}

// Only called when a sum of squares was not finite, so it need not be fast. On the bits: no NaN rule of max or compare.
int64_t count_nonfinite(const void* x, DType dtype, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::kFloat64) {
      uint64_t bits;
      memcpy(&bits, static_cast<const double*>(x) + i, sizeof bits);
      found += (bits >> 52 & 0x7ff) == 0x7ff;
    } else if (dtype == DType::kFloat32) {
      uint32_t bits;
      memcpy(&bits, static_cast<const float*>(x) + i, sizeof bits);
      found += (bits >> 23 & 0xff) == 0xff;
    } else {
      const uint16_t exponent = dtype == DType::kBfloat16 ? 0x7f80 : 0x7c00;
      found += (static_cast<const uint16_t*>(x)[i] & exponent) == exponent;
    }
  }
  return found;
}

}  // namespace

extern const SampleNormsKernels sample_norms;
const SampleNormsKernels sample_norms = {&sum_squares, &count_nonfinite};

}  // namespace lipcore::LIPCORE_ISA
