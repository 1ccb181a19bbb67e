// Sixteen virtual lanes on every instruction set: F32x16 and F64x16 with the handful of operations the statistics
// kernels use. Every operation is one IEEE operation per lane and nothing is fused, so base, AVX2 and AVX-512 give the
// same bits. Included once by each kernel source, inside its own namespace (see isa.h): nothing here may have external
// linkage.

#if defined(__AVX512F__)

struct F32x16 {
  __m512 v;
};
struct F64x16 {
  __m512d lo, hi;
};
using U16x16 = __m256i;

LIPCORE_INLINE F32x16 f32(float x) { return {_mm512_set1_ps(x)}; }
LIPCORE_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LIPCORE_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
LIPCORE_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LIPCORE_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LIPCORE_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LIPCORE_INLINE F32x16 max_abs(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, _mm512_abs_ps(b.v))}; }
constexpr int kNotFinite = 0x99;  // infinities, quiet and signalling NaN
LIPCORE_INLINE bool all_finite(F32x16 a) { return _mm512_fpclass_ps_mask(a.v, kNotFinite) == 0; }

LIPCORE_INLINE F64x16 f64(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
LIPCORE_INLINE F64x16 load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
LIPCORE_INLINE void store(double* p, F64x16 a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}
LIPCORE_INLINE F64x16 operator+(F64x16 a, F64x16 b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
LIPCORE_INLINE F64x16 operator-(F64x16 a, F64x16 b) { return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)}; }
LIPCORE_INLINE F64x16 operator*(F64x16 a, F64x16 b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
LIPCORE_INLINE F64x16 max_abs(F64x16 a, F64x16 b) {
  return {_mm512_max_pd(a.lo, _mm512_abs_pd(b.lo)), _mm512_max_pd(a.hi, _mm512_abs_pd(b.hi))};
}
LIPCORE_INLINE bool all_finite(F64x16 a) {
  return (_mm512_fpclass_pd_mask(a.lo, kNotFinite) | _mm512_fpclass_pd_mask(a.hi, kNotFinite)) == 0;
}

LIPCORE_INLINE F64x16 widen(F32x16 a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
LIPCORE_INLINE F64x16 load_wide(const float* p) {  // a conversion that reads memory needs no shuffle
  return {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
LIPCORE_INLINE F32x16 widen_bfloat16(const uint16_t* p) {
  const U16x16 bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
LIPCORE_INLINE F32x16 widen_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(__AVX2__)

struct F32x16 {
  __m256 v[2];
};
struct F64x16 {
  __m256d v[4];
};

LIPCORE_INLINE F32x16 f32(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
LIPCORE_INLINE F32x16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
LIPCORE_INLINE void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
LIPCORE_INLINE F64x16 f64(double x) {
  const __m256d a = _mm256_set1_pd(x);
  return {{a, a, a, a}};
}
LIPCORE_INLINE F64x16 load(const double* p) {
  return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)}};
}
LIPCORE_INLINE void store(double* p, F64x16 a) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, a.v[i]);
}

#define LIPCORE_BINARY(symbol, name)                                                   \
  LIPCORE_INLINE F32x16 operator symbol(F32x16 a, F32x16 b) {                          \
    return {{_mm256_##name##_ps(a.v[0], b.v[0]), _mm256_##name##_ps(a.v[1], b.v[1])}}; \
  }                                                                                    \
  LIPCORE_INLINE F64x16 operator symbol(F64x16 a, F64x16 b) {                          \
    return {{_mm256_##name##_pd(a.v[0], b.v[0]), _mm256_##name##_pd(a.v[1], b.v[1]),   \
             _mm256_##name##_pd(a.v[2], b.v[2]), _mm256_##name##_pd(a.v[3], b.v[3])}}; \
  }
LIPCORE_BINARY(+, add)
LIPCORE_BINARY(-, sub)
LIPCORE_BINARY(*, mul)
#undef LIPCORE_BINARY

LIPCORE_INLINE F32x16 max_abs(F32x16 a, F32x16 b) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {
      {_mm256_max_ps(a.v[0], _mm256_andnot_ps(sign, b.v[0])), _mm256_max_ps(a.v[1], _mm256_andnot_ps(sign, b.v[1]))}};
}
LIPCORE_INLINE F64x16 max_abs(F64x16 a, F64x16 b) {
  const __m256d sign = _mm256_set1_pd(-0.0);
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_max_pd(a.v[i], _mm256_andnot_pd(sign, b.v[i]));
  return a;
}
// x - x is NaN where x is not finite, and so is a sum in which that is.
LIPCORE_INLINE bool all_finite(F32x16 a) {
  const __m256 sum = _mm256_add_ps(_mm256_sub_ps(a.v[0], a.v[0]), _mm256_sub_ps(a.v[1], a.v[1]));
  return _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q)) == 0;
}
LIPCORE_INLINE bool all_finite(F64x16 a) {
  __m256d sum = _mm256_sub_pd(a.v[0], a.v[0]);
  for (int i = 1; i < 4; ++i) sum = _mm256_add_pd(sum, _mm256_sub_pd(a.v[i], a.v[i]));
  return _mm256_movemask_pd(_mm256_cmp_pd(sum, sum, _CMP_UNORD_Q)) == 0;
}

LIPCORE_INLINE F64x16 widen(F32x16 a) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.v[0])), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v[0], 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(a.v[1])), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v[1], 1))}};
}
LIPCORE_INLINE F64x16 load_wide(const float* p) {  // a conversion that reads memory needs no shuffle
  return {{_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4)), _mm256_cvtps_pd(_mm_loadu_ps(p + 8)),
           _mm256_cvtps_pd(_mm_loadu_ps(p + 12))}};
}
LIPCORE_INLINE __m256 widen_8_bfloat16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
LIPCORE_INLINE F32x16 widen_bfloat16(const uint16_t* p) { return {{widen_8_bfloat16(p), widen_8_bfloat16(p + 8)}}; }
LIPCORE_INLINE F32x16 widen_float16(const uint16_t* p) {
  return {{_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
           _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))}};
}

#else  // base: vectors of 16 bytes, which every platform has in some form

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef int64_t Long2 __attribute__((vector_size(16)));

// Halves of halves and not an array, which the compiler would keep in memory.
template <class V>
struct Two {
  V lo, hi;
};
using F32x16 = Two<Two<Float4>>;
using F64x16 = Two<Two<Two<Double2>>>;

template <class V>
LIPCORE_INLINE Two<V> both(V a) {
  return {a, a};
}
LIPCORE_INLINE F32x16 f32(float x) { return both(both(Float4{x, x, x, x})); }
LIPCORE_INLINE F64x16 f64(double x) { return both(both(both(Double2{x, x}))); }

template <class V, class T>
LIPCORE_INLINE void load_into(V* a, const T* p) {
  memcpy(a, p, sizeof *a);
}
template <class V, class T>
LIPCORE_INLINE void load_into(Two<V>* a, const T* p) {
  load_into(&a->lo, p);
  load_into(&a->hi, p + sizeof(V) / sizeof *p);
}
template <class V, class T>
LIPCORE_INLINE void store_from(V a, T* p) {
  memcpy(p, &a, sizeof a);
}
template <class V, class T>
LIPCORE_INLINE void store_from(const Two<V>& a, T* p) {
  store_from(a.lo, p);
  store_from(a.hi, p + sizeof(V) / sizeof *p);
}
LIPCORE_INLINE F32x16 load(const float* p) {
  F32x16 a;
  load_into(&a, p);
  return a;
}
LIPCORE_INLINE F64x16 load(const double* p) {
  F64x16 a;
  load_into(&a, p);
  return a;
}
LIPCORE_INLINE void store(float* p, F32x16 a) { store_from(a, p); }
LIPCORE_INLINE void store(double* p, F64x16 a) { store_from(a, p); }

#define LIPCORE_BINARY(symbol)                                              \
  template <class V>                                                        \
  LIPCORE_INLINE Two<V> operator symbol(const Two<V>& a, const Two<V>& b) { \
    return {a.lo symbol b.lo, a.hi symbol b.hi};                            \
  }
LIPCORE_BINARY(+)
LIPCORE_BINARY(-)
LIPCORE_BINARY(*)
#undef LIPCORE_BINARY

LIPCORE_INLINE Float4 max_abs(Float4 a, Float4 b) {
  const Float4 x = reinterpret_cast<Float4>(reinterpret_cast<Int4>(b) & INT32_MAX);
  return a > x ? a : x;
}
LIPCORE_INLINE Double2 max_abs(Double2 a, Double2 b) {
  const Double2 x = reinterpret_cast<Double2>(reinterpret_cast<Long2>(b) & INT64_MAX);
  return a > x ? a : x;
}
template <class V>
LIPCORE_INLINE Two<V> max_abs(const Two<V>& a, const Two<V>& b) {
  return {max_abs(a.lo, b.lo), max_abs(a.hi, b.hi)};
}

// x - x is NaN where x is not finite, and so is a sum in which that is.
LIPCORE_INLINE bool all_finite(Float4 a) {
  const Float4 zero = a - a;
  return zero[0] + zero[1] + zero[2] + zero[3] == 0;
}
LIPCORE_INLINE bool all_finite(Double2 a) {
  const Double2 zero = a - a;
  return zero[0] + zero[1] == 0;
}
template <class V>
LIPCORE_INLINE bool all_finite(const Two<V>& a) {
  return all_finite(a.lo - a.lo + (a.hi - a.hi));
}

LIPCORE_INLINE Two<Double2> widen(Float4 a) {
  const auto wide = __builtin_convertvector(a, Double4);  // element by element it would be one at a time
  return {Double2{wide[0], wide[1]}, Double2{wide[2], wide[3]}};
}
LIPCORE_INLINE F64x16 widen(F32x16 a) { return {{widen(a.lo.lo), widen(a.lo.hi)}, {widen(a.hi.lo), widen(a.hi.hi)}}; }
LIPCORE_INLINE F64x16 load_wide(const float* p) { return widen(load(p)); }
LIPCORE_INLINE F32x16 widen_bfloat16(const uint16_t* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = bfloat16_to_float(p[i]);
  return load(lanes);
}
LIPCORE_OUTLINE F32x16 widen_float16(const uint16_t* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = float16_to_float(p[i]);
  return load(lanes);
}

#endif

LIPCORE_INLINE F64x16 widen(F64x16 a) { return a; }
LIPCORE_INLINE F64x16 load_wide(const double* p) { return load(p); }

// sum + v * v for a v that was widened from float32 or less: the square is exact in float64, so that a fused operation,
// where there is one, gives the bits of multiply-then-add.
LIPCORE_INLINE F64x16 add_exact_square(F64x16 sum, F64x16 v) {
#if defined(__AVX512F__)
  return {_mm512_fmadd_pd(v.lo, v.lo, sum.lo), _mm512_fmadd_pd(v.hi, v.hi, sum.hi)};
#else
  return sum + v * v;
#endif
}
LIPCORE_INLINE F64x16 add_square(F64x16 sum, F32x16 v) { return add_exact_square(sum, widen(v)); }
LIPCORE_INLINE F64x16 add_square(F64x16 sum, F64x16 v) { return sum + v * v; }

// Fixed tree, the same on every instruction set: lane i takes lane i + 8, then i + 4, i + 2, i + 1.
LIPCORE_INLINE double sum_lanes(F64x16 a) {
#if defined(__AVX512F__)
  const __m512d eight = _mm512_add_pd(a.lo, a.hi);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
#elif defined(__AVX2__)
  const __m256d four = _mm256_add_pd(_mm256_add_pd(a.v[0], a.v[2]), _mm256_add_pd(a.v[1], a.v[3]));
#endif
#if defined(__AVX2__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
  const auto eight = a.lo + a.hi;
  const auto four = eight.lo + eight.hi;
  const Double2 two = four.lo + four.hi;
  return two[0] + two[1];
#endif
}

LIPCORE_INLINE double max_lane(F64x16 a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_pd(_mm512_max_pd(a.lo, a.hi));
#else
  double t[16];
  store(t, a);
  for (int i = 1; i < 16; ++i) t[0] = t[i] > t[0] ? t[i] : t[0];
  return t[0];
#endif
}

// How elements of a type are read into lanes and kept in memory.
template <DType>
struct Element;
template <>
struct Element<DType::kFloat32> {
  using Stored = float;
  using Lanes = F32x16;
  using Mean = float;
  LIPCORE_INLINE F32x16 read(const float* p) { return load(p); }
  LIPCORE_INLINE F32x16 set(double x) { return f32(static_cast<float>(x)); }
};
template <>
struct Element<DType::kFloat64> {
  using Stored = double;
  using Lanes = F64x16;
  using Mean = double;
  LIPCORE_INLINE F64x16 read(const double* p) { return load(p); }
  LIPCORE_INLINE F64x16 set(double x) { return f64(x); }
};
template <>
struct Element<DType::kBfloat16> {
  using Stored = uint16_t;
  using Lanes = F32x16;
  using Mean = float;
  LIPCORE_INLINE F32x16 read(const uint16_t* p) { return widen_bfloat16(p); }
  LIPCORE_INLINE F32x16 set(double x) { return f32(static_cast<float>(x)); }
};
template <>
struct Element<DType::kFloat16> {
  using Stored = uint16_t;
  using Lanes = F32x16;
  using Mean = float;
  LIPCORE_INLINE F32x16 read(const uint16_t* p) { return widen_float16(p); }
  LIPCORE_INLINE F32x16 set(double x) { return f32(static_cast<float>(x)); }
};

// Calls body.template operator()<dtype>() for the run-time dtype.
template <class Body>
LIPCORE_INLINE auto with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(Element<DType::kFloat64>{});
    case DType::kBfloat16:
      return body(Element<DType::kBfloat16>{});
    case DType::kFloat16:
      return body(Element<DType::kFloat16>{});
    default:
      return body(Element<DType::kFloat32>{});
  }
}
