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

constexpr int kAhead = 8;

// Columns [c, c + 16) of several rows, so that the sums travel between cache and registers once per group of rows. The
// rows of a later group are fetched on the way: too many short streams at once for the hardware to foresee.
template <int kRows, bool kShift, bool kScale, class E, class Read>
LIPCORE_INLINE void add_sixteen(E element, const typename E::Stored* const* g, const typename E::Stored* const* x,
                                int64_t c, int64_t g_ahead, int64_t x_ahead, double* shift, double* scale,
                                const Read& read) {
  F64x16 plain = f64(0), product = f64(0);
  if (kShift) plain = load(shift + c);
  if (kScale) product = load(scale + c);
  for (int k = 0; k < kRows; ++k) {
    __builtin_prefetch(g[k] + (c + g_ahead));
    if (kScale) __builtin_prefetch(x[k] + (c + x_ahead));
    const F64x16 v = read(g[k] + c);
    if (kShift) plain = plain + v;
    if (kScale) product = add_product(element, product, v, read(x[k] + c));
  }
  if (kShift) store(shift + c, plain);
  if (kScale) store(scale + c, product);
}

template <int kRows, bool kShift, bool kScale, class E>
LIPCORE_INLINE void add_row_group(E element, const RowSumBlock& b, int64_t row, double* shift, double* scale) {
  using Stored = typename E::Stored;
  const Stored *g[kRows], *x[kRows];
  for (int k = 0; k < kRows; ++k) {
    g[k] = static_cast<const Stored*>(b.g) + (row + k) * b.g_step;
    x[k] = kScale ? static_cast<const Stored*>(b.x) + (row + k) * b.x_step : nullptr;
  }
  const int64_t columns = b.columns, g_ahead = kAhead * b.g_step, x_ahead = kAhead * b.x_step;
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16)
    add_sixteen<kRows, kShift, kScale>(element, g, x, c, g_ahead, x_ahead, shift, scale,
                                       [](const Stored* p) { return widen(E::read(p)); });
  if (c < columns)
    add_sixteen<kRows, kShift, kScale>(element, g, x, c, g_ahead, x_ahead, shift, scale,
                                       [&](const Stored* p) { return read_wide<E>(p, columns - c); });
}

template <bool kShift, bool kScale, class E>
LIPCORE_INLINE void add_rows(E element, const RowSumBlock& b, double* shift, double* scale) {
  int64_t row = 0;
  for (; row + 4 <= b.rows; row += 4) add_row_group<4, kShift, kScale>(element, b, row, shift, scale);
  for (; row < b.rows; ++row) add_row_group<1, kShift, kScale>(element, b, row, shift, scale);
}

// Each column is a run of memory.
template <bool kShift, bool kScale, class E>
LIPCORE_INLINE void add_columns(E element, const RowSumBlock& b, double* shift, double* scale) {
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

void add(const RowSumBlock& block, double* shift, double* scale) {
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

// A row is read twice while it is in the first-level cache: squares about the mean itself lose no digits, however far
// from 0 the row is.
void statistics(const RowSumBlock& block, double eps, bool center, RowStatistics* rows) {
  with_dtype(block.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(block.x);
    const int64_t whole = block.columns / 16 * 16;
    const double share = 1 / static_cast<double>(block.columns);
    for (int64_t r = 0; r < block.rows; ++r, x += block.x_step) {
      double tail[16], mean = 0, square = 0;
      if (whole < block.columns) store(tail, read_wide<E>(x + whole, block.columns - whole));
      if (center) {
        F64x16 sum[2] = {f64(0), f64(0)};
        for (int64_t i = 0, k = 0; i < whole; i += 16, k ^= 1) sum[k] = sum[k] + widen(E::read(x + i));
        mean = sum_lanes(sum[0] + sum[1]);
        for (int64_t k = 0; k < block.columns - whole; ++k) mean += tail[k];
        mean *= share;
      }
      F64x16 squares[2] = {f64(0), f64(0)};
      for (int64_t i = 0, k = 0; i < whole; i += 16, k ^= 1) {
        const F64x16 apart = widen(E::read(x + i)) - f64(mean);
        squares[k] = squares[k] + apart * apart;
      }
      square = sum_lanes(squares[0] + squares[1]);
      for (int64_t k = 0; k < block.columns - whole; ++k) square += (tail[k] - mean) * (tail[k] - mean);
      rows[r] = {mean, 1 / __builtin_sqrt(square * share + eps)};
    }
  });
}

// In the layer's own precision. A mean of float64 is taken off in two parts, so that what is left of numbers far from 0
// has all its digits.
void normalize(const RowSumBlock& block, const RowStatistics* rows, void* out) {
  with_dtype(block.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Mean;
    const auto* x = static_cast<const typename E::Stored*>(block.x);
    T* to = static_cast<T*>(out);
    for (int64_t r = 0; r < block.rows; ++r, x += block.x_step, to += block.columns) {
      const T rounded = static_cast<T>(rows[r].mean);
      const auto high = E::set(rows[r].mean), low = E::set(rows[r].mean - static_cast<double>(rounded));
      const auto factor = E::set(rows[r].factor);
      int64_t i = 0;
      for (; i + 16 <= block.columns; i += 16) store(to + i, (E::read(x + i) - high - low) * factor);
      if (i == block.columns) continue;
      typename E::Stored tail[16] = {};
      T values[16];
      memcpy(tail, x + i, static_cast<size_t>(block.columns - i) * sizeof tail[0]);
      store(values, (E::read(tail) - high - low) * factor);
      memcpy(to + i, values, static_cast<size_t>(block.columns - i) * sizeof values[0]);
    }
  });
}

}  // namespace

extern const RowSumNormsKernels row_sum_norms;
const RowSumNormsKernels row_sum_norms = {&add, &statistics, &normalize};

}  // namespace lipcore::LIPCORE_ISA
