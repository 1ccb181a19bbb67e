// Columns of a block summed over its rows, of g and of g * x. Everything is widened to float64 first: sums over a
// sequence cancel, and float32 partial sums would lose what is left. Products of float32 are exact there.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

template <class E>
LIPCORE_INLINE F64x16 read_wide(const typename E::Stored* p, int64_t count) {
  if (count >= 16) return widen(E::read(p));
  typename E::Stored tail[16] = {};
  memcpy(tail, p, static_cast<size_t>(count) * sizeof tail[0]);
  return widen(E::read(tail));
}

template <class E>
LIPCORE_INLINE F64x16 add_product(E, F64x16 sum, F64x16 a, F64x16 b) {
#if defined(__AVX512F__)
  // Fused where the product is exact, which gives the bits of multiply-then-add.
  if (sizeof(typename E::Stored) < 8) return {_mm512_fmadd_pd(a.lo, b.lo, sum.lo), _mm512_fmadd_pd(a.hi, b.hi, sum.hi)};
#endif
  return sum + a * b;
}

// Several rows at a time, so that the sums travel between cache and registers once per group of rows.
template <int kRows, bool kShift, bool kScale, class E>
LIPCORE_INLINE void add_row_group(E element, const TermBlock& b, int64_t row, double* shift, double* scale) {
  const auto* g = static_cast<const typename E::Stored*>(b.g) + row * b.g_step;
  const auto* x = kScale ? static_cast<const typename E::Stored*>(b.x) + row * b.x_step : nullptr;
  for (int64_t c = 0; c < b.columns; c += 16) {
    F64x16 plain = f64(0), product = f64(0);
    if (kShift) plain = load(shift + c);
    if (kScale) product = load(scale + c);
    for (int k = 0; k < kRows; ++k) {
      const F64x16 v = read_wide<E>(g + k * b.g_step + c, b.columns - c);
      if (kShift) plain = plain + v;
      if (kScale) product = add_product(element, product, v, read_wide<E>(x + k * b.x_step + c, b.columns - c));
    }
    if (kShift) store(shift + c, plain);
    if (kScale) store(scale + c, product);
  }
}

template <bool kShift, bool kScale, class E>
LIPCORE_INLINE void add_rows(E element, const TermBlock& b, double* shift, double* scale) {
  int64_t row = 0;
  for (; row + 8 <= b.rows; row += 8) add_row_group<8, kShift, kScale>(element, b, row, shift, scale);
  for (; row < b.rows; ++row) add_row_group<1, kShift, kScale>(element, b, row, shift, scale);
}

// Each column is a run of memory.
template <bool kShift, bool kScale, class E>
LIPCORE_INLINE void add_columns(E element, const TermBlock& b, double* shift, double* scale) {
  for (int64_t c = 0; c < b.columns; ++c) {
    const auto* g = static_cast<const typename E::Stored*>(b.g) + c * b.g_step;
    const auto* x = kScale ? static_cast<const typename E::Stored*>(b.x) + c * b.x_step : nullptr;
    F64x16 plain[2] = {f64(0), f64(0)}, product[2] = {f64(0), f64(0)};
    for (int64_t i = 0, k = 0; i < b.rows; i += 16, k ^= 1) {
      const F64x16 v = read_wide<E>(g + i, b.rows - i);
      if (kShift) plain[k] = plain[k] + v;
      if (kScale) product[k] = add_product(element, product[k], v, read_wide<E>(x + i, b.rows - i));
    }
    if (kShift) shift[c] += sum_lanes(plain[0] + plain[1]);
    if (kScale) scale[c] += sum_lanes(product[0] + product[1]);
  }
}

void add(const TermBlock& block, double* shift, double* scale) {
  with_dtype(block.dtype, [&](auto element) {
    if (block.row_runs) {
      if (shift && scale) return add_rows<true, true>(element, block, shift, scale);
      return shift ? add_rows<true, false>(element, block, shift, scale)
                   : add_rows<false, true>(element, block, shift, scale);
    }
    if (shift && scale) return add_columns<true, true>(element, block, shift, scale);
    return shift ? add_columns<true, false>(element, block, shift, scale)
                 : add_columns<false, true>(element, block, shift, scale);
  });
}

}  // namespace

extern const TermSumsKernels term_sums;
const TermSumsKernels term_sums = {&add};

}  // namespace lipcore::LIPCORE_ISA
