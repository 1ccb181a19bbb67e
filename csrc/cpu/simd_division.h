// Division and square root of sixteen lanes. IEEE rounds both correctly, so that they too give the same bits on every
// instruction set; approximate reciprocals would not. Included after cpu/simd.h, inside the source's namespace.

#if defined(__AVX512F__)

LIPCORE_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
LIPCORE_INLINE F64x16 operator/(F64x16 a, F64x16 b) { return {_mm512_div_pd(a.lo, b.lo), _mm512_div_pd(a.hi, b.hi)}; }
LIPCORE_INLINE F32x16 square_root(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
LIPCORE_INLINE F64x16 square_root(F64x16 a) { return {_mm512_sqrt_pd(a.lo), _mm512_sqrt_pd(a.hi)}; }

#elif defined(__AVX2__)

LIPCORE_INLINE F32x16 operator/(F32x16 a, F32x16 b) {
  return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
}
LIPCORE_INLINE F64x16 operator/(F64x16 a, F64x16 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_div_pd(a.v[i], b.v[i]);
  return a;
}
LIPCORE_INLINE F32x16 square_root(F32x16 a) { return {{_mm256_sqrt_ps(a.v[0]), _mm256_sqrt_ps(a.v[1])}}; }
LIPCORE_INLINE F64x16 square_root(F64x16 a) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_sqrt_pd(a.v[i]);
  return a;
}

#else

LIPCORE_INLINE Float4 square_root(Float4 a) {
  return Float4{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
LIPCORE_INLINE Double2 square_root(Double2 a) { return Double2{__builtin_sqrt(a[0]), __builtin_sqrt(a[1])}; }
template <class V>
LIPCORE_INLINE Two<V> square_root(const Two<V>& a) {
  return {square_root(a.lo), square_root(a.hi)};
}
template <class V>
LIPCORE_INLINE Two<V> operator/(const Two<V>& a, const Two<V>& b) {
  return {a.lo / b.lo, a.hi / b.hi};
}

#endif
