// Dot products of all pairs of a few rows of float32 that lie in memory: the Gram matrices of a sample with few tokens,
// where packing panels (cpu/matrix_tile.h) takes as long as half of the products. A vector holds 16 features of one
// row, so rows are read where they lie and nothing is transposed; the 16 lanes of a sum are added in a fixed tree.
// Included once by a kernel source after cpu/simd.h, inside its own namespace. AVX-512 alone: with the 16 registers of
// AVX2 the tiles are too small to gain anything (measured: 0.8 to 1.4 of the time of packed panels).

constexpr int kDotSide = 4;             // rows by rows whose sums stay in registers
constexpr int kDots = 16;               // of one such tile
constexpr int64_t kDotRows = 128;       // of a matrix, at most
constexpr int64_t kDotFeatures = 1024;  // summed at a time: kDotSide rows of them stay in the first-level cache

// sums[kDotSide * r + s] += the sum of the lanes of c[r][s].
LIPCORE_INLINE void add_lanes(const F32x16 (&c)[kDotSide][kDotSide], float* sums) {
  // Of two vectors the sums of halves fill one, of two such ones those of quarters, and so on: a blend, a shuffle and
  // an addition each. (Two shuffles and an addition take longer: one port shuffles.)
  __m512 a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = c[i / 4][i % 4].v;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a[i], a[i + 8]), _mm512_shuffle_f32x4(a[i], a[i + 8], 0x4e));
  const __m512i odd = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    a[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a[i], a[i + 4]), _mm512_permutex2var_ps(a[i], odd, a[i + 4]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    a[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a[i], a[i + 2]), _mm512_shuffle_ps(a[i], a[i + 2], 0x4e));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_permutexvar_ps(order, all)));
}

// Rows of one operand, padded by repeating the last one; `tails` holds what is left of each beyond whole vectors.
struct DotRows {
  const float* first;
  int64_t stride, count, features;
  const float* tails;  // [count][16], zero beyond the end
};

LIPCORE_INLINE void add_dots(const DotRows& rows, int64_t from, int64_t steps, bool tail, int64_t i, int64_t j,
                             float* sums) {
  const float *a[kDotSide], *b[kDotSide];
  int64_t row[kDotSide], column[kDotSide];
#pragma GCC unroll 4
  for (int r = 0; r < kDotSide; ++r) {
    row[r] = i + r < rows.count ? i + r : rows.count - 1;
    column[r] = j + r < rows.count ? j + r : rows.count - 1;
    a[r] = rows.first + row[r] * rows.stride + from;
    b[r] = rows.first + column[r] * rows.stride + from;
  }
  F32x16 c[kDotSide][kDotSide] = {};
  const auto step = [&](const float* const(&left)[kDotSide], const float* const(&right)[kDotSide], int64_t k) {
    F32x16 y[kDotSide];
#pragma GCC unroll 4
    for (int s = 0; s < kDotSide; ++s) y[s] = load(right[s] + k);
#pragma GCC unroll 4
    for (int r = 0; r < kDotSide; ++r) {
      const F32x16 x = load(left[r] + k);
#pragma GCC unroll 4
      for (int s = 0; s < kDotSide; ++s) c[r][s] = fma(x, y[s], c[r][s]);
    }
  };
  for (int64_t k = 0; k < 16 * steps; k += 16) step(a, b, k);
  if (tail) {
    const float *left[kDotSide], *right[kDotSide];
#pragma GCC unroll 4
    for (int r = 0; r < kDotSide; ++r) {
      left[r] = rows.tails + 16 * row[r];
      right[r] = rows.tails + 16 * column[r];
    }
    step(left, right, 0);
  }
  add_lanes(c, sums);
}

// The dots of rows i >= j by tiles: `out` holds kDots of them for each, row by row of tiles.
LIPCORE_OUTLINE void all_dots(const float* first, int64_t stride, int64_t count, int64_t features, float* tails,
                              float* out) {
  const int64_t tiles = (count + kDotSide - 1) / kDotSide, whole = features / 16 * 16;
  memset(out, 0, sizeof(float) * static_cast<size_t>(kDots * tiles * (tiles + 1) / 2));
  for (int64_t i = 0; i < count && whole < features; ++i) {
    memset(tails + 16 * i, 0, 16 * sizeof(float));
    memcpy(tails + 16 * i, first + i * stride + whole, sizeof(float) * static_cast<size_t>(features - whole));
  }
  const DotRows rows{first, stride, count, features, tails};
  int64_t from = 0;
  do {
    const int64_t length = whole - from < kDotFeatures ? whole - from : kDotFeatures;
    const bool tail = from + length == whole && whole < features;
    float* sums = out;
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t j = 0; j <= i; ++j, sums += kDots)
        add_dots(rows, from, length / 16, tail, kDotSide * i, kDotSide * j, sums);
    from += length;
  } while (from < whole);
}

// Of tiles of both matrices' dots, those of one row of tiles left of the diagonal: the sum of their products, of the
// first `rows` rows of each tile.
LIPCORE_INLINE double sum_products(const float* x, const float* grad, int64_t rows, int64_t tiles) {
  F64x16 sum = f64(0);
  if (rows == kDotSide) {
    for (int64_t t = 0; t < tiles; ++t) sum = sum + widen(load(x + kDots * t)) * widen(load(grad + kDots * t));
    return sum_lanes(sum);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    double products[kDots] = {};
    for (int64_t k = 0; k < kDotSide * rows; ++k)
      products[k] = static_cast<double>(x[kDots * t + k]) * static_cast<double>(grad[kDots * t + k]);
    sum = sum + load(products);
  }
  return sum_lanes(sum);
}

// What a LinearNormsKernels::gram is to return, from both operands' all_dots().
LIPCORE_INLINE GramSums sum_dots(const float* x, const float* grad, int64_t count) {
  double beside = 0;
  GramSums sums{0, 0, 0, 0};
  for (int64_t i = 0; kDotSide * i < count; ++i) {
    const int64_t rows = count - kDotSide * i < kDotSide ? count - kDotSide * i : kDotSide;
    beside += sum_products(x, grad, rows, i);
    x += kDots * i;
    grad += kDots * i;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < r; ++s)
        beside += static_cast<double>(x[kDotSide * r + s]) * static_cast<double>(grad[kDotSide * r + s]);
      const double of_x = x[(kDotSide + 1) * r], of_grad = grad[(kDotSide + 1) * r];
      sums.diagonal += of_x * of_grad;
      sums.x += of_x;
      sums.grad += of_grad;
    }
    x += kDots;
    grad += kDots;
  }
  sums.total = 2 * beside + sums.diagonal;
  return sums;
}
