// One optimizer step of one run of a parameter: reads w, w_prev and the deviation from the mean, writes w_prev and the
// deviation, 20 bytes per float32 element and nothing twice. Built once per instruction set. Differences and deviations
// in the working type (float32, or float64 for float64 parameters); every product and sum in float64, in 16 lanes that
// are added in a fixed order: error of a sum <= 1e-13, of M2 <= 1e-7, relative.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

// Elements ahead. Three streams, two of them written, are more than the hardware follows: worth 10 to 15 % of the
// limit.
constexpr int64_t kPrefetch = 512;

template <class E>
struct Sums {
  F64x16 dw_sq = f64(0), m2 = f64(0), weight_sq = f64(0);
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
LIPCORE_INLINE void observe_16(const typename E::Stored* w, typename E::Stored* w_prev, typename E::Mean* deviation,
                               typename E::Mean* m2, typename E::Lanes share, Sums<E>* sums) {
  const auto before = E::read(w_prev);
  auto now = E::read(w);
  if (__builtin_expect(all_finite(now), 1)) {
    memcpy(w_prev, w, 16 * sizeof *w);
  } else {
    typename E::Stored standing[16];
    sums->nonfinite += stand_still<E>(w, w_prev, standing);
    now = E::read(standing);
    memcpy(w_prev, standing, sizeof standing);
  }
  const auto m = observe_movement(now, before, kRestart ? E::set(0) : load(deviation), share);
  store(deviation, m.deviation_after);
  if (kElements) store(m2, (kRestart ? E::set(0) : load(m2)) + m.deviation * m.deviation_after);
  sums->dw_sq = add_square(sums->dw_sq, m.step);
  sums->m2 = sums->m2 + widen(m.deviation) * widen(m.deviation_after);
  sums->weight_sq = add_square(sums->weight_sq, now);
  sums->max_dw = max_abs(sums->max_dw, m.step);
}

template <class E, bool kRestart, bool kElements>
LIPCORE_INLINE void observe_run(const TrajectoryChunk& chunk, StepSums* out) {
  const auto* w = static_cast<const typename E::Stored*>(chunk.w);
  auto* w_prev = static_cast<typename E::Stored*>(chunk.w_prev);
  auto* deviation = static_cast<typename E::Mean*>(chunk.deviation);
  auto* m2 = static_cast<typename E::Mean*>(chunk.m2);
  const auto share = E::set(chunk.share);
  Sums<E> sums;
  int64_t i = 0;
  for (; i + 16 <= chunk.count; i += 16) {
    __builtin_prefetch(w + i + kPrefetch);
    __builtin_prefetch(w_prev + i + kPrefetch, 1);
    __builtin_prefetch(deviation + i + kPrefetch, 1);
    observe_16<E, kRestart, kElements>(w + i, w_prev + i, deviation + i, kElements ? m2 + i : nullptr, share, &sums);
  }
  if (const size_t rest = static_cast<size_t>(chunk.count - i)) {
    // The tail runs through the same lanes, padded with zeros that add nothing.
    typename E::Stored now[16] = {}, before[16] = {};
    typename E::Mean tail[16] = {}, tail_m2[16] = {};
    memcpy(now, w + i, rest * sizeof *w);
    memcpy(before, w_prev + i, rest * sizeof *w);
    memcpy(tail, deviation + i, rest * sizeof *tail);
    if (kElements) memcpy(tail_m2, m2 + i, rest * sizeof *m2);
    observe_16<E, kRestart, kElements>(now, before, tail, tail_m2, share, &sums);
    if (kElements) memcpy(m2 + i, tail_m2, rest * sizeof *m2);
    memcpy(w_prev + i, before, rest * sizeof *w);
    memcpy(deviation + i, tail, rest * sizeof *tail);
  }
  out->dw_sq = sum_lanes(sums.dw_sq);
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
