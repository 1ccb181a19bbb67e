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
  const auto* x = static_cast<const typename E::Stored*>(data);
  // Four independent sums hide the latency of the addition.
  F64x16 sums[4] = {f64(0), f64(0), f64(0), f64(0)};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int k = 0; k < 4; ++k) {
      sums[k] = add_square(sums[k], E::read(x + i + 16 * k));
    }
  }
  // Unrolled, so that the sums stay in registers: through memory they would cost a short row as much as its elements.
  for (int k = 0; k < 4; ++k, i += 16) {
    if (i + 16 <= count) {
      sums[k] = add_square(sums[k], E::read(x + i));
    } else if (i < count) {
      typename E::Stored tail[16] = {};
      memcpy(tail, x + i, static_cast<size_t>(count - i) * sizeof tail[0]);
      sums[k] = add_square(sums[k], E::read(tail));
    }
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
