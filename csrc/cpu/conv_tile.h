// Register-tiled products whose rows are read element by element wherever they lie: row m of step k is
// rows[m][offsets[k]], so a patch of an image needs no copy of its own. Columns are vectors, one group of lanes per
// step. Included once by a kernel source after cpu/simd.h, inside its own namespace: nothing here may have external
// linkage. Products are fused where the instruction set can.

template <class T>
struct Vector;

#if defined(__AVX512F__)

template <>
struct Vector<float> {
  static constexpr int kLanes = 16;
  __m512 v;
};
template <>
struct Vector<double> {
  static constexpr int kLanes = 8;
  __m512d v;
};
LIPCORE_INLINE Vector<float> load_vector(const float* p) { return {_mm512_loadu_ps(p)}; }
LIPCORE_INLINE Vector<double> load_vector(const double* p) { return {_mm512_loadu_pd(p)}; }
LIPCORE_INLINE Vector<float> all_lanes(float x) { return {_mm512_set1_ps(x)}; }
LIPCORE_INLINE Vector<double> all_lanes(double x) { return {_mm512_set1_pd(x)}; }
LIPCORE_INLINE void store_vector(float* p, Vector<float> a) { _mm512_storeu_ps(p, a.v); }
LIPCORE_INLINE void store_vector(double* p, Vector<double> a) { _mm512_storeu_pd(p, a.v); }
LIPCORE_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
LIPCORE_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
constexpr int kTileRows = 8, kTileVectors = 3;

#elif defined(__AVX2__)

template <>
struct Vector<float> {
  static constexpr int kLanes = 8;
  __m256 v;
};
template <>
struct Vector<double> {
  static constexpr int kLanes = 4;
  __m256d v;
};
LIPCORE_INLINE Vector<float> load_vector(const float* p) { return {_mm256_loadu_ps(p)}; }
LIPCORE_INLINE Vector<double> load_vector(const double* p) { return {_mm256_loadu_pd(p)}; }
LIPCORE_INLINE Vector<float> all_lanes(float x) { return {_mm256_set1_ps(x)}; }
LIPCORE_INLINE Vector<double> all_lanes(double x) { return {_mm256_set1_pd(x)}; }
LIPCORE_INLINE void store_vector(float* p, Vector<float> a) { _mm256_storeu_ps(p, a.v); }
LIPCORE_INLINE void store_vector(double* p, Vector<double> a) { _mm256_storeu_pd(p, a.v); }
LIPCORE_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
LIPCORE_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
constexpr int kTileRows = 6, kTileVectors = 2;

#else  // base: vectors of 16 bytes, which every platform has in some form

template <>
struct Vector<float> {
  static constexpr int kLanes = 4;
  typedef float Native __attribute__((vector_size(16)));
  Native v;
};
template <>
struct Vector<double> {
  static constexpr int kLanes = 2;
  typedef double Native __attribute__((vector_size(16)));
  Native v;
};
template <class T>
LIPCORE_INLINE Vector<T> load_vector(const T* p) {
  Vector<T> a;
  memcpy(&a.v, p, sizeof a.v);
  return a;
}
LIPCORE_INLINE Vector<float> all_lanes(float x) { return {Vector<float>::Native{x, x, x, x}}; }
LIPCORE_INLINE Vector<double> all_lanes(double x) { return {Vector<double>::Native{x, x}}; }
template <class T>
LIPCORE_INLINE void store_vector(T* p, Vector<T> a) {
  memcpy(p, &a.v, sizeof a.v);
}
template <class T>
LIPCORE_INLINE Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
  return {a.v * b.v + c.v};
}
constexpr int kTileRows = 6, kTileVectors = 2;

#endif

// How `count` things are shared out over the fewest shares of at most `most`, as evenly as possible: 27 rows are 7 + 7
// + 7 + 6 and not 8 + 8 + 8 + 3, whose last tile would have too few independent sums to hide an addition's latency.
struct Shares {
  int64_t count, small, larger;  // the first `larger` shares have small + 1
};
LIPCORE_INLINE Shares share_out(int64_t count, int64_t most) {
  const int64_t shares = (count + most - 1) / most;
  return {shares, shares ? count / shares : 0, shares ? count % shares : 0};
}
LIPCORE_INLINE int64_t share_begin(const Shares& s, int64_t i) { return i * s.small + (i < s.larger ? i : s.larger); }
LIPCORE_INLINE int64_t share_size(const Shares& s, int64_t i) { return s.small + (i < s.larger); }

// c[m][v] = sum over k of rows[m][offsets[k]] * columns[k * stride + lanes of v].
template <class T, int kRows, int kVectors>
LIPCORE_INLINE void multiply_tile(int64_t depth, const int64_t* offsets, const T* const* rows, const T* columns,
                                  int64_t stride, Vector<T> (&c)[kRows][kVectors]) {
  constexpr int kLanes = Vector<T>::kLanes;
  const T* row[kRows];
  for (int m = 0; m < kRows; ++m) {
    row[m] = rows[m];
    for (int v = 0; v < kVectors; ++v) c[m][v] = all_lanes(T(0));
  }
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = offsets[k];
    Vector<T> column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load_vector(columns + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vector<T> x = all_lanes(row[m][at]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[m][v] = multiply_add(x, column[v], c[m][v]);
    }
    columns += stride;
  }
}

// Sums of more terms than this are added up in float64, piece by piece.
constexpr int64_t kPiece = 1024;

LIPCORE_INLINE void add_lanes(double* sums, Vector<double> a) {
  double lanes[Vector<double>::kLanes];
  store_vector(lanes, a);
  for (int i = 0; i < Vector<double>::kLanes; ++i) sums[i] += lanes[i];
}
LIPCORE_INLINE void add_lanes(double* sums, Vector<float> a) {
  float lanes[Vector<float>::kLanes];
  store_vector(lanes, a);
  for (int i = 0; i < Vector<float>::kLanes; ++i) sums[i] += static_cast<double>(lanes[i]);
}

// A tile of the result: adds the squares of its elements to sums[lane]. Float32 squares may leave the range; the sum
// then shows it.
template <class T, int kRows, int kVectors>
void square_tile(int64_t depth, const int64_t* offsets, const T* const* rows, const T* columns, int64_t stride,
                 double* sums) {
  constexpr int kLanes = Vector<T>::kLanes;
  Vector<T> c[kRows][kVectors];
  if (depth <= kPiece || sizeof(T) == 8) {
    multiply_tile<T>(depth, offsets, rows, columns, stride, c);
    Vector<T> squares[kVectors];
    for (int v = 0; v < kVectors; ++v) squares[v] = all_lanes(T(0));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) squares[v] = multiply_add(c[m][v], c[m][v], squares[v]);
    for (int v = 0; v < kVectors; ++v) add_lanes(sums, squares[v]);
    return;
  }
  double whole[kRows * kVectors * kLanes] = {};
  for (int64_t begin = 0; begin < depth; begin += kPiece) {
    const int64_t count = depth - begin < kPiece ? depth - begin : kPiece;
    multiply_tile<T>(count, offsets + begin, rows, columns + begin * stride, stride, c);
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVectors; ++v) add_lanes(whole + (m * kVectors + v) * kLanes, c[m][v]);
  }
  for (int i = 0; i < kRows * kVectors; ++i)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += whole[i * kLanes + lane] * whole[i * kLanes + lane];
}

// A tile of the result, written: row m to out + m * out_stride.
template <class T, int kRows, int kVectors>
void store_tile(int64_t depth, const int64_t* offsets, const T* const* rows, const T* columns, int64_t stride, T* out,
                int64_t out_stride) {
  Vector<T> c[kRows][kVectors];
  multiply_tile<T>(depth, offsets, rows, columns, stride, c);
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) store_vector(out + m * out_stride + v * Vector<T>::kLanes, c[m][v]);
}

// Calls body.template operator() with the run-time tile size as types.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <class Body>
LIPCORE_INLINE void with_vectors(int64_t vectors, const Body& body) {
  if (vectors == 1) return body(Constant<1>{});
  if (vectors == 2) return body(Constant<2>{});
  body(Constant<kTileVectors>{});
}
template <class Body>
LIPCORE_INLINE void with_tile(int64_t rows, int64_t vectors, const Body& body) {
  with_vectors(vectors, [&](auto v) {
    switch (rows) {
      case 1:
        return body(Constant<1>{}, v);
      case 2:
        return body(Constant<2>{}, v);
      case 3:
        return body(Constant<3>{}, v);
      case 4:
        return body(Constant<4>{}, v);
      case 5:
        return body(Constant<5>{}, v);
      case 6:
        return body(Constant<6>{}, v);
      case 7:
        return body(Constant < kTileRows<7 ? kTileRows : 7>{}, v);
      default:
        return body(Constant<kTileRows>{}, v);
    }
  });
}

// to[k * stride + i] = from[i * pitch + k] for i < rows, k < columns.
template <class T>
LIPCORE_INLINE void transpose(const T* from, int64_t pitch, int64_t rows, int64_t columns, T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < columns; ++k) to[k * stride + i] = from[i * pitch + k];
}

#if defined(__AVX512F__)
// 16 x 16 in registers: pairs, quadruples, then 128-bit lanes change places.
LIPCORE_INLINE void transpose_block(const float* from, int64_t pitch, float* to, int64_t stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * pitch);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d lo = _mm512_castps_pd(b[i + h]), hi = _mm512_castps_pd(b[i + 2 + h]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  // a[4 q + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 q ... 4 q + 3, one per 128-bit lane.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88),
                 odd01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (j + 8) * stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(to + (j + 4) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (j + 12) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
constexpr int kTransposed = 16;
#elif defined(__AVX2__)
LIPCORE_INLINE void transpose_block(const float* from, int64_t pitch, float* to, int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * pitch);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      const __m256d lo = _mm256_castps_pd(b[i + h]), hi = _mm256_castps_pd(b[i + 2 + h]);
      a[i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi));
      a[i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi));
    }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (j + 4) * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}
constexpr int kTransposed = 8;
#endif

#if defined(__AVX2__)
LIPCORE_INLINE void transpose(const float* from, int64_t pitch, int64_t rows, int64_t columns, float* to,
                              int64_t stride) {
  int64_t i = 0;
  for (; i + kTransposed <= rows; i += kTransposed) {
    int64_t k = 0;
    for (; k + kTransposed <= columns; k += kTransposed)
      transpose_block(from + i * pitch + k, pitch, to + k * stride + i, stride);
    transpose<float>(from + i * pitch + k, pitch, kTransposed, columns - k, to + k * stride + i, stride);
  }
  transpose<float>(from + i * pitch, pitch, rows - i, columns, to + i, stride);
}
#endif
