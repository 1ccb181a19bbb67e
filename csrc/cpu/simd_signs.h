// Two more operations on sixteen lanes (see simd.h, which comes first): lanes permuted by XOR, signs flipped by bits.

#if defined(__AVX512F__)

struct Permutations {
  alignas(64) int32_t lanes[16][16];
  alignas(64) int16_t upper_halves[16][32];
};
constexpr Permutations xor_permutations() {
  Permutations all{};
  for (int by = 0; by < 16; ++by) {
    for (int i = 0; i < 16; ++i) all.lanes[by][i] = i ^ by;
    for (int i = 0; i < 16; ++i) all.upper_halves[by][2 * i + 1] = static_cast<int16_t>(i ^ by);
  }
  return all;
}
constexpr Permutations kXor = xor_permutations();  // a load is cheaper than a broadcast from a general register

// Lane i takes lane i ^ by.
LIPCORE_INLINE F32x16 xor_lanes(F32x16 a, uint32_t by) {
  return {_mm512_permutexvar_ps(_mm512_load_si512(kXor.lanes[by]), a.v)};
}
LIPCORE_INLINE F64x16 xor_lanes(F64x16 a, uint32_t by) {
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i lo = _mm512_xor_si512(lanes, _mm512_set1_epi64(static_cast<int>(by)));
  const __m512i hi = _mm512_xor_si512(lo, _mm512_set1_epi64(8));
  return {_mm512_permutex2var_pd(a.lo, lo, a.hi), _mm512_permutex2var_pd(a.lo, hi, a.hi)};
}

// Widens and permutes bfloat16 in one instruction.
LIPCORE_INLINE F32x16 widen_bfloat16_xor(const uint16_t* p, uint32_t by) {
  const __m512i bits = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i from = _mm512_load_si512(kXor.upper_halves[by]);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, bits))};
}

// Lane i changes its sign when bit i is set.
LIPCORE_INLINE F32x16 flip_signs(F32x16 a, uint32_t bits) {
  // Or GCC keeps the whole hash in a mask register and reads the bucket's address back from it, slowly.
  __asm__("" : "+r"(bits));
  return {_mm512_mask_xor_ps(a.v, static_cast<__mmask16>(bits), a.v, _mm512_set1_ps(-0.0f))};
}
LIPCORE_INLINE F64x16 flip_signs(F64x16 a, uint32_t bits) {
  const __m512d sign = _mm512_set1_pd(-0.0);
  return {_mm512_mask_xor_pd(a.lo, static_cast<__mmask8>(bits), a.lo, sign),
          _mm512_mask_xor_pd(a.hi, static_cast<__mmask8>(bits >> 8), a.hi, sign)};
}

#elif defined(__AVX2__)

LIPCORE_INLINE F32x16 xor_lanes(F32x16 a, uint32_t by) {
  const __m256i lanes = _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(by & 7));
  const __m256 p = _mm256_permutevar8x32_ps(a.v[0], lanes), q = _mm256_permutevar8x32_ps(a.v[1], lanes);
  const __m256 swap = _mm256_castsi256_ps(_mm256_set1_epi32(by & 8 ? -1 : 0));
  return {{_mm256_blendv_ps(p, q, swap), _mm256_blendv_ps(q, p, swap)}};
}
LIPCORE_INLINE F64x16 xor_lanes(F64x16 a, uint32_t by) {
  // As pairs of 32-bit lanes; whole vectors change places in memory.
  const __m256i lanes = _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(2 * (by & 3)));
  double t[16];
  for (int i = 0; i < 4; ++i)
    _mm256_storeu_pd(t + 4 * i, _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a.v[i]), lanes)));
  for (uint32_t i = 0; i < 4; ++i) a.v[i] = _mm256_loadu_pd(t + 4 * (i ^ by >> 2));
  return a;
}

LIPCORE_INLINE F32x16 flip_signs(F32x16 a, uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits)), sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i lo = _mm256_sllv_epi32(all, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
  const __m256i hi = _mm256_sllv_epi32(all, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16));
  return {{_mm256_xor_ps(a.v[0], _mm256_castsi256_ps(_mm256_and_si256(lo, sign))),
           _mm256_xor_ps(a.v[1], _mm256_castsi256_ps(_mm256_and_si256(hi, sign)))}};
}
LIPCORE_INLINE F64x16 flip_signs(F64x16 a, uint32_t bits) {
  const __m256i all = _mm256_set1_epi64x(bits), sign = _mm256_set1_epi64x(INT64_MIN);
  for (int i = 0; i < 4; ++i) {
    const __m256i by = _mm256_sub_epi64(_mm256_setr_epi64x(63, 62, 61, 60), _mm256_set1_epi64x(4 * i));
    const __m256d flip = _mm256_castsi256_pd(_mm256_and_si256(_mm256_sllv_epi64(all, by), sign));
    a.v[i] = _mm256_xor_pd(a.v[i], flip);
  }
  return a;
}

#else

LIPCORE_INLINE F32x16 xor_lanes(F32x16 a, uint32_t by) {
  float from[16], to[16];
  store(from, a);
  for (uint32_t i = 0; i < 16; ++i) to[i] = from[i ^ by];
  return load(to);
}
LIPCORE_INLINE F64x16 xor_lanes(F64x16 a, uint32_t by) {
  double from[16], to[16];
  store(from, a);
  for (uint32_t i = 0; i < 16; ++i) to[i] = from[i ^ by];
  return load(to);
}

// Lanes of the lowest bits; the rest is for the lanes behind.
LIPCORE_INLINE Float4 flip_signs(Float4 a, uint32_t bits) {
  const auto all = static_cast<int32_t>(bits);
  const Int4 lane = {1, 2, 4, 8}, set = (Int4{all, all, all, all} & lane) == lane;
  return reinterpret_cast<Float4>(reinterpret_cast<Int4>(a) ^ (set & INT32_MIN));
}
LIPCORE_INLINE Double2 flip_signs(Double2 a, uint32_t bits) {
  const auto all = static_cast<int64_t>(bits);
  return reinterpret_cast<Double2>(reinterpret_cast<Long2>(a) ^ ((Long2{all << 1, all} << 62) & INT64_MIN));
}
template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(V{}[0]);
template <class V>
constexpr int kLanesOf<Two<V>> = 2 * kLanesOf<V>;
template <class V>
LIPCORE_INLINE Two<V> flip_signs(const Two<V>& a, uint32_t bits) {
  return {flip_signs(a.lo, bits), flip_signs(a.hi, bits >> kLanesOf<V>)};
}

#endif

// Sixteen elements from memory, lane i that of place i ^ by.
template <class E>
LIPCORE_INLINE typename E::Lanes read_xor(E, const typename E::Stored* p, uint32_t by) {
  return xor_lanes(E::read(p), by);
}
#if defined(__AVX512F__)
LIPCORE_INLINE F32x16 read_xor(Element<DType::kBfloat16>, const uint16_t* p, uint32_t by) {
  return widen_bfloat16_xor(p, by);
}
#endif
