// Rows of a sparse gradient added up in float64, and the tile of a product of three matrices that is only summed.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

void add_row(const void* row, DType dtype, int64_t count, double weight, double* sums) {
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(row);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(sums + i, load(sums + i) + f64(weight) * widen(E::read(x + i)));
    if (i == count) return;
    typename E::Stored tail[16] = {};
    double wide[16];
    memcpy(tail, x + i, static_cast<size_t>(count - i) * sizeof tail[0]);
    store(wide, f64(weight) * widen(E::read(tail)));
    for (int64_t k = 0; i + k < count; ++k) sums[i + k] += wide[k];
  });
}

template <bool kNarrow>
LIPCORE_INLINE F64x16 add_scaled(F64x16 sum, double c, F64x16 a) {
#if defined(__AVX512F__)
  // Fused where the product is exact, which gives the bits of multiply-then-add.
  if (kNarrow) {
    const __m512d factor = _mm512_set1_pd(c);
    return {_mm512_fmadd_pd(factor, a.lo, sum.lo), _mm512_fmadd_pd(factor, a.hi, sum.hi)};
  }
#endif
  return sum + f64(c) * a;
}

template <bool kNarrow>
LIPCORE_INLINE double cross_of(const double* c, const double* a, int64_t rows, const double* e, int64_t e_step) {
  F64x16 sums[kCrossTokens];
  for (F64x16& sum : sums) sum = f64(0);
  for (int64_t s = 0; s < rows; ++s) {
    const F64x16 v = load(a + s * kCrossLanes);
    for (int j = 0; j < kCrossTokens; ++j) sums[j] = add_scaled<kNarrow>(sums[j], c[s * kCrossTokens + j], v);
  }
  F64x16 total = f64(0);
  for (int j = 0; j < kCrossTokens; ++j) total = total + sums[j] * load(e + j * e_step);
  return sum_lanes(total);
}

double cross(const double* c, const double* a, int64_t rows, const double* e, int64_t e_step, bool narrow) {
  return narrow ? cross_of<true>(c, a, rows, e, e_step) : cross_of<false>(c, a, rows, e, e_step);
}

}  // namespace

extern const TokenSumsKernels token_sums;
const TokenSumsKernels token_sums = {&add_row, &cross};

}  // namespace lipcore::LIPCORE_ISA
