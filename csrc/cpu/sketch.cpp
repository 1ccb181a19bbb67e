// CountSketch of one run of a parameter: reads every element once, adds it to its bucket and returns the sum of
// squares. Built once per instruction set. Widened to float64 before anything is added: a bucket's error is that of a
// float64 sum, and a movement of 1e-6 of the weights' norm survives in the difference of two sketches (float32 buckets
// would be 13 % off there). Squares in 32 lanes, added in a fixed order.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"
#include "cpu/simd_signs.h"

// Read ahead, in bytes: far more than the hardware does, since the buckets keep its load queue busy.
constexpr int64_t kPrefetch = 12288;

template <class E>
LIPCORE_INLINE void add_group(const typename E::Stored* w, uint32_t h, int64_t bucket_count, double* buckets,
                              F64x16* squares) {
  const auto x = xor_lanes(flip_signs(E::read(w), sign_bits(h)), bucket_xor(h));
  double* at = buckets + first_bucket(h, bucket_count);
  *squares = add_square(*squares, x);
  store(at, load(at) + widen(x));
}

template <class E>
LIPCORE_INLINE double add_run(const SketchRun& run, double* buckets) {
  using Stored = typename E::Stored;
  const auto* w = static_cast<const Stored*>(run.w);
  const uint64_t key = run.key;
  const int64_t bucket_count = run.buckets;
  int64_t pair = run.first_index / kSketchPair, left = run.count;
  F64x16 squares[2] = {f64(0), f64(0)};
  const auto add_pair = [&](const Stored* elements, uint64_t bits) __attribute__((always_inline)) {
    add_group<E>(elements, static_cast<uint32_t>(bits), bucket_count, buckets, &squares[0]);
    add_group<E>(elements + kSketchGroup, static_cast<uint32_t>(bits >> 32), bucket_count, buckets, &squares[1]);
  };
  // Both ends run through the same lanes, padded with zeros that add nothing.
  if (const int64_t offset = run.first_index % kSketchPair) {
    const int64_t count = left < kSketchPair - offset ? left : kSketchPair - offset;
    Stored padded[kSketchPair] = {};
    memcpy(padded + offset, w, static_cast<size_t>(count) * sizeof *w);
    add_pair(padded, sketch_bits(key, pair++));
    w += count;
    left -= count;
  }
  for (; left >= kSketchPair; left -= kSketchPair, w += kSketchPair) {
    for (size_t byte = 0; byte < kSketchPair * sizeof *w; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetch + byte);
    add_pair(w, sketch_bits(key, pair++));
  }
  if (left) {
    Stored padded[kSketchPair] = {};
    memcpy(padded, w, static_cast<size_t>(left) * sizeof *w);
    add_pair(padded, sketch_bits(key, pair));
  }
  return sum_lanes(squares[0] + squares[1]);
}

double add(const SketchRun& run, double* buckets) {
  return with_dtype(run.dtype, [&](auto element) { return add_run<decltype(element)>(run, buckets); });
}

}  // namespace

extern const SketchKernels sketch;
const SketchKernels sketch = {&add};

}  // namespace lipcore::LIPCORE_ISA
