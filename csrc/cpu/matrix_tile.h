// Register-tiled products of packed panels. Included once by a kernel source after cpu/simd.h, inside its own
// namespace: nothing here may have external linkage. Products are fused where the instruction set can, so results are
// the same for any number of threads on one instruction set, and within rounding across instruction sets.
//
// A packed panel holds kWidth (or kRows) columns of a matrix, one group per step of the summed index: [depth][width],
// zero where the matrix ends. Who packs decides what the matrix is: rows of memory here, patches in a convolution.

#if defined(__AVX512F__)
LIPCORE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LIPCORE_INLINE F64x16 fma(F64x16 a, F64x16 b, F64x16 c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
#elif defined(__AVX2__)
LIPCORE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
LIPCORE_INLINE F64x16 fma(F64x16 a, F64x16 b, F64x16 c) {
  return {{_mm256_fmadd_pd(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_pd(a.v[1], b.v[1], c.v[1]),
           _mm256_fmadd_pd(a.v[2], b.v[2], c.v[2]), _mm256_fmadd_pd(a.v[3], b.v[3], c.v[3])}};
}
#else
LIPCORE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return a * b + c; }
LIPCORE_INLINE F64x16 fma(F64x16 a, F64x16 b, F64x16 c) { return a * b + c; }
#endif

// kVectors x 16 columns by kRows rows of sums stay in registers. kSharedRows divides kWidth, so that a panel of columns
// also serves as panels of rows (the Gram matrix); a tile of its own packing may have more.
template <class T>
struct Tile;
template <>
struct Tile<float> {
  using Lanes = F32x16;
  LIPCORE_INLINE F32x16 all(float x) { return f32(x); }
#if defined(__AVX512F__)
  static constexpr int kVectors = 2, kRows = 12, kSharedRows = 8;
#elif defined(__AVX2__)
  static constexpr int kVectors = 1, kRows = 6, kSharedRows = 4;
#else
  static constexpr int kVectors = 1, kRows = 2, kSharedRows = 2;
#endif
  static constexpr int kWidth = 16 * kVectors;
};
template <>
struct Tile<double> {
  using Lanes = F64x16;
  LIPCORE_INLINE F64x16 all(double x) { return f64(x); }
#if defined(__AVX512F__)
  static constexpr int kVectors = 1, kRows = 8, kSharedRows = 8;
#elif defined(__AVX2__)
  static constexpr int kVectors = 1, kRows = 2, kSharedRows = 2;
#else
  static constexpr int kVectors = 1, kRows = 1, kSharedRows = 1;
#endif
  static constexpr int kWidth = 16 * kVectors;
};

constexpr int64_t kBlock = 256;  // rows and columns of the result that one task works on
constexpr int64_t kDepth = 256;  // steps packed at a time: a panel of columns then stays in the first-level cache
constexpr int64_t kPadded = kBlock + 32;  // a block in whole panels of any width

// c += a^T b over `depth` steps; kStride is the width of the panel that a points into.
template <class T, int kStride, int kRows, int kVectors>
LIPCORE_INLINE void accumulate(int64_t depth, const T* __restrict a, const T* __restrict b,
                               typename Tile<T>::Lanes (&c)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    typename Tile<T>::Lanes columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto row = Tile<T>::all(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[r][v] = fma(row, columns[v], c[r][v]);
    }
    a += kStride;
    b += Tile<T>::kWidth;
  }
}

// Consecutive packed steps that belong to one sum.
struct Segment {
  int64_t begin, count;
};

// One tile of a block: sums of all segments, each handed to finish(segment, c) as soon as it is there.
template <class T, int kStride, int kRows, int kVectors, class Start, class Finish>
LIPCORE_INLINE void tile_sums(const Segment* segments, int64_t count, const T* a, const T* b, const Start& start,
                              const Finish& finish) {
  for (int64_t s = 0; s < count; ++s) {
    typename Tile<T>::Lanes c[kRows][kVectors];
    start(s, c);
    accumulate<T, kStride>(segments[s].count, a + segments[s].begin * kStride, b + segments[s].begin * Tile<T>::kWidth,
                           c);
    finish(s, c);
  }
}

template <class Lanes, int kRows, int kVectors>
LIPCORE_INLINE void clear(Lanes (&c)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) c[r][v] = Lanes{};
}

// All tiles of a block of rows x columns from panels of `depth` packed steps. needed(i, j) says how many of a tile's
// columns matter (none: it is skipped); start(i, j, s, c) sets a tile before its products, finish(i, j, s, c) takes it.
// A tile has all its vectors or, where half of them are enough, half.
template <class T, int kStride, int kRows, class Needed, class Start, class Finish>
LIPCORE_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const Segment* segments, int64_t count,
                             const T* a, const T* b, const Needed& needed, const Start& start, const Finish& finish) {
  constexpr int kWidth = Tile<T>::kWidth, kAll = Tile<T>::kVectors, kHalf = kAll > 1 ? kAll / 2 : 1;
  for (int64_t j = 0; j < columns; j += kWidth) {
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t wanted = needed(i, j);
      if (wanted <= 0) continue;
      const T* rows_of = a + i / kStride * kStride * depth + i % kStride;
      const T* columns_of = b + j * depth;
      const auto begin = [&](int64_t s, auto& c) { start(i, j, s, c); };
      const auto end = [&](int64_t s, auto& c) { finish(i, j, s, c); };
      if (wanted <= 16 * kHalf) {
        tile_sums<T, kStride, kRows, kHalf>(segments, count, rows_of, columns_of, begin, end);
      } else {
        tile_sums<T, kStride, kRows, kAll>(segments, count, rows_of, columns_of, begin, end);
      }
    }
  }
}

// Tiles of a block, one after another; a tile is kRows x kWidth.
template <class T, int kRows>
LIPCORE_INLINE T* tile_at(T* block, int64_t rows, int64_t i, int64_t j) {
  constexpr int kWidth = Tile<T>::kWidth;
  const int64_t per_column = (rows + kRows - 1) / kRows;
  return block + (j / kWidth * per_column + i / kRows) * (kRows * kWidth);
}
template <class T, class Lanes, int kRows, int kVectors>
LIPCORE_INLINE void load_tile(const T* tile, Lanes (&c)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) c[r][v] = load(tile + r * Tile<T>::kWidth + 16 * v);
}

template <class T, class Lanes, int kRows, int kVectors>
LIPCORE_INLINE void add_tile(const T* tile, Lanes (&c)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) c[r][v] = c[r][v] + load(tile + r * Tile<T>::kWidth + 16 * v);
}
template <class T, class Lanes, int kRows, int kVectors>
LIPCORE_INLINE void store_tile(T* tile, const Lanes (&c)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(tile + r * Tile<T>::kWidth + 16 * v, c[r][v]);
}

// ---- packing

LIPCORE_INLINE F64x16 widened(F32x16 a) { return widen(a); }
LIPCORE_INLINE F64x16 widened(F64x16 a) { return a; }
LIPCORE_INLINE void put(float* to, F32x16 a, double) { store(to, a); }
LIPCORE_INLINE void put(float*, F64x16, double) {}  // float64 is never computed in float32
LIPCORE_INLINE void put(double* to, F32x16 a, double scale) { store(to, widen(a) * f64(scale)); }
LIPCORE_INLINE void put(double* to, F64x16 a, double scale) { store(to, a * f64(scale)); }

// `count` elements in the working type; a scale is for float64 alone.
template <class E, class T>
LIPCORE_INLINE void convert(E, const typename E::Stored* from, int64_t count, double scale, T* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) put(to + i, E::read(from + i), scale);
  if (i == count) return;
  typename E::Stored tail[16] = {};
  T values[16] = {};
  memcpy(tail, from + i, static_cast<size_t>(count - i) * sizeof tail[0]);
  put(values, E::read(tail), scale);
  memcpy(to + i, values, static_cast<size_t>(count - i) * sizeof values[0]);
}

// Rows of memory: element j of row i is data[first + i * stride + j].
struct Rows {
  const void* data;
  DType dtype;
  int64_t first, stride;
  double scale;
};

// `length` elements of rows [begin, begin + count) in the working type, to + i * pitch. A call of its own for some rows
// at a time: a kernel for each dtype would be four times the code and gain nothing.
template <class T>
LIPCORE_OUTLINE void read_rows(const Rows& rows, int64_t begin, int64_t count, int64_t length, T* to, int64_t pitch) {
  with_dtype(rows.dtype, [&](auto element) {
    const auto* from = static_cast<const typename decltype(element)::Stored*>(rows.data) + rows.first;
    for (int64_t i = 0; i < count; ++i)
      convert(element, from + (begin + i) * rows.stride, length, rows.scale, to + i * pitch);
  });
}

// Steps [at, at + steps) of panels of `depth` steps, kWidth columns each, from as many rows: step k is row k. Eight
// steps at a time, so that rows are read from end to end and panels are written in runs.
template <class T, int kWidth>
LIPCORE_INLINE void pack_columns(const Rows& rows, int64_t steps, int64_t columns, int64_t depth, int64_t at, T* to) {
  constexpr int64_t kRun = 8, kPitch = kPadded + 16;
  alignas(64) T buffer[kRun * kPitch];
  const int64_t whole = (columns + kWidth - 1) / kWidth * kWidth;
  for (int64_t k = 0; k < steps; k += kRun) {
    const int64_t run = steps - k < kRun ? steps - k : kRun;
    read_rows(rows, k, run, columns, buffer, kPitch);
    for (int64_t r = 0; r < run; ++r)
      for (int64_t j = columns; j < whole; ++j) buffer[r * kPitch + j] = 0;
    for (int64_t j = 0; j < columns; j += kWidth)
      for (int64_t r = 0; r < run; ++r)
        memcpy(to + j * depth + (at + k + r) * kWidth, buffer + r * kPitch + j, sizeof(T) * kWidth);
  }
}

#if defined(__AVX512F__)
// to[k * width + i] = from[i][k] for 16 x 16.
LIPCORE_INLINE void transpose_16(const float* from, int64_t stride, float* to, int64_t width) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d p = _mm512_castps_pd(b[4 * i]), q = _mm512_castps_pd(b[4 * i + 1]);
    const __m512d r = _mm512_castps_pd(b[4 * i + 2]), s = _mm512_castps_pd(b[4 * i + 3]);
    a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
    a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
    a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * width, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(to + (j + 4) * width, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(to + (j + 8) * width, _mm512_shuffle_f32x4(even, even2, 0xdd));
    _mm512_storeu_ps(to + (j + 12) * width, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
}
#else
LIPCORE_INLINE void transpose_16(const float* from, int64_t stride, float* to, int64_t width) {
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 16; ++i) to[k * width + i] = from[i * stride + k];
}
#endif
LIPCORE_INLINE void transpose_16(const double* from, int64_t stride, double* to, int64_t width) {
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 16; ++i) to[k * width + i] = from[i * stride + k];
}

// Panels whose columns are rows of memory (the Gram matrix), `steps` values of each.
template <class T, int kWidth>
LIPCORE_OUTLINE void pack_rows(const Rows& rows, int64_t steps, int64_t count, T* to) {
  constexpr int64_t kStride = kDepth + 16;  // not a power of two: rows would share cache sets
  alignas(64) T buffer[16 * kStride];
  for (int64_t panel = 0; panel < count; panel += kWidth) {
    for (int64_t i = 0; i < kWidth; i += 16) {
      T* group = to + panel * steps + i;
      const int64_t left = count - panel - i, read = left < 0 ? 0 : left < 16 ? left : 16;
      read_rows(rows, panel + i, read, steps, buffer, kStride);
      for (int64_t r = read; r < 16; ++r) memset(buffer + r * kStride, 0, sizeof(T) * static_cast<size_t>(steps));
      int64_t k = 0;
      for (; k + 16 <= steps; k += 16) transpose_16(buffer + k, kStride, group + k * kWidth, kWidth);
      for (; k < steps; ++k)
        for (int r = 0; r < 16; ++r) group[k * kWidth + r] = buffer[r * kStride + k];
    }
  }
}
