// One optimizer step of one run of a parameter: reads w, w_prev, w0 and the mean, writes w_prev and the mean, 24 bytes
// per float32 element and nothing twice. Built once per instruction set. Differences and the mean in the working type
// (float32, or float64 for float64 parameters); every product and sum in float64, in 16 lanes that are added in a fixed
// order: error of a sum <= 1e-13, of M2 <= 1e-7, relative.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

// Elements ahead. Four streams, two of them written, are more than the hardware follows: worth 10 to 15 % of the limit.
constexpr int64_t kPrefetch = 512;

template <class E>
struct Sums {
  F64x16 dw_sq = f64(0), dist_sq = f64(0), m2 = f64(0), weight_sq = f64(0);
  typename E::Lanes max_dw = E::set(0);
  int64_t nonfinite = 0;
};

// Sixteen elements some of which are not finite: those count as what they were before. Rare, so plain.
template <class E>
LIPCORE_OUTLINE int64_t stand_still(const typename E::Stored* w, const typename E::Stored* w_prev,
                                    typename E::Stored* standing) {
  typename E::Mean values[16];
  store(values, E::read(w));
  int64_t count = 0;
  for (int i = 0; i < 16; ++i) {
    const bool finite = values[i] - values[i] == 0;
    standing[i] = finite ? w[i] : w_prev[i];
    count += !finite;
  }
  return count;
}

template <class E, bool kRestart, bool kElements>
LIPCORE_INLINE void observe_16(const typename E::Stored* w, typename E::Stored* w_prev, const typename E::Stored* w0,
                               typename E::Mean* mean, typename E::Mean* m2, typename E::Lanes inv_count,
                               Sums<E>* sums) {
  const auto before = E::read(w_prev), origin = E::read(w0);
  auto now = E::read(w);
  if (__builtin_expect(all_finite(now), 1)) {
    memcpy(w_prev, w, 16 * sizeof *w);
  } else {
    typename E::Stored standing[16];
    sums->nonfinite += stand_still<E>(w, w_prev, standing);
    now = E::read(standing);
    memcpy(w_prev, standing, sizeof standing);
  }
  const auto old_mean = kRestart ? before - origin : load(mean);
  const auto m = observe_movement(now, before, origin, old_mean, inv_count);
  store(mean, m.mean);
  if (kElements) store(m2, (kRestart ? E::set(0) : load(m2)) + m.deviation * m.deviation_after);
  sums->dw_sq = add_square(sums->dw_sq, m.step);
  sums->dist_sq = add_square(sums->dist_sq, m.offset);
  sums->m2 = sums->m2 + widen(m.deviation) * widen(m.deviation_after);
  sums->weight_sq = add_square(sums->weight_sq, now);
  sums->max_dw = max_abs(sums->max_dw, m.step);
}

template <class E, bool kRestart, bool kElements>
LIPCORE_INLINE void observe_run(const TrajectoryChunk& chunk, StepSums* out) {
  const auto* w = static_cast<const typename E::Stored*>(chunk.w);
  auto* w_prev = static_cast<typename E::Stored*>(chunk.w_prev);
  const auto* w0 = static_cast<const typename E::Stored*>(chunk.w0);
  auto* mean = static_cast<typename E::Mean*>(chunk.mean);
  auto* m2 = static_cast<typename E::Mean*>(chunk.m2);
  const auto inv_count = E::set(chunk.inv_count);
  Sums<E> sums;
  int64_t i = 0;
  for (; i + 16 <= chunk.count; i += 16) {
    __builtin_prefetch(w + i + kPrefetch);
    __builtin_prefetch(w_prev + i + kPrefetch, 1);
    __builtin_prefetch(w0 + i + kPrefetch);
    __builtin_prefetch(mean + i + kPrefetch, 1);
    observe_16<E, kRestart, kElements>(w + i, w_prev + i, w0 + i, mean + i, kElements ? m2 + i : nullptr, inv_count,
                                       &sums);
  }
  if (const size_t rest = static_cast<size_t>(chunk.count - i)) {
    // The tail runs through the same lanes, padded with zeros that add nothing.
    typename E::Stored now[16] = {}, before[16] = {}, origin[16] = {};
    typename E::Mean tail_mean[16] = {}, tail_m2[16] = {};
    memcpy(now, w + i, rest * sizeof *w);
    memcpy(before, w_prev + i, rest * sizeof *w);
    memcpy(origin, w0 + i, rest * sizeof *w);
    memcpy(tail_mean, mean + i, rest * sizeof *mean);
    if (kElements) memcpy(tail_m2, m2 + i, rest * sizeof *m2);
    observe_16<E, kRestart, kElements>(now, before, origin, tail_mean, tail_m2, inv_count, &sums);
    if (kElements) memcpy(m2 + i, tail_m2, rest * sizeof *m2);
    memcpy(w_prev + i, before, rest * sizeof *w);
    memcpy(mean + i, tail_mean, rest * sizeof *mean);
  }
  out->dw_sq = sum_lanes(sums.dw_sq);
  out->dist_sq = sum_lanes(sums.dist_sq);
  out->m2_increment = sum_lanes(sums.m2);
  out->max_abs_dw = max_lane(widen(sums.max_dw));
  out->weight_sq = sum_lanes(sums.weight_sq);
  out->nonfinite = static_cast<double>(sums.nonfinite);
}

void chunk(const TrajectoryChunk& chunk, StepSums* sums) {
  with_dtype(chunk.dtype, [&](auto element) {
    using E = decltype(element);
    if (chunk.m2)
      chunk.restart ? observe_run<E, true, true>(chunk, sums) : observe_run<E, false, true>(chunk, sums);
    else
      chunk.restart ? observe_run<E, true, false>(chunk, sums) : observe_run<E, false, false>(chunk, sums);
  });
}

}  // namespace

extern const TrajectoryStepKernels trajectory_step;
const TrajectoryStepKernels trajectory_step = {&chunk};

}  // namespace lipcore::LIPCORE_ISA
