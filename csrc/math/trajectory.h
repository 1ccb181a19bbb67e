// One parameter's movement in one optimizer step, and the sums kept of it. Shared by the CPU kernels (V = a vector of
// 16 lanes) and the CUDA kernels (V = float or double).
//
// The mean is kept of the offset w - w0, not of w: a weight of 1 that moves by 1e-6 would lose its movement in a
// float32 mean of w, while the offset is exact (Sterbenz) and as small as the movement itself.
#pragma once

#include <cmath>

#include "math/dtype.h"

namespace lipcore {

template <class V>
struct Movement {
  V step;             // w - w_prev
  V offset;           // w - w0
  V mean;             // running mean of the offset, this point included
  V deviation;        // offset - old mean
  V deviation_after;  // offset - new mean
};

// Welford's update; inv_count is 1 / (number of points, this one included). Multiply, then add: never fused, so that
// every instruction set gives the same bits.
template <class V>
LIPCORE_INLINE Movement<V> observe_movement(V w, V w_prev, V w0, V mean, V inv_count) {
  Movement<V> m;
  m.step = w - w_prev;
  m.offset = w - w0;
  m.deviation = m.offset - mean;
  m.mean = mean + m.deviation * inv_count;
  m.deviation_after = m.offset - m.mean;
  return m;
}

// Sums over the elements of one tensor (or of one chunk of it) for one step. All float64; an empty one is the identity
// of merge. A non-finite element counts as what it was before, w_prev, so that the state stays as it would be had it
// stood still.
struct StepSums {
  double dw_sq;         // sum (w - w_prev)^2
  double dist_sq;       // sum (w - w0)^2
  double m2_increment;  // sum (offset - old mean)(offset - new mean)
  double max_abs_dw;    // max |w - w_prev|
  double weight_sq;     // sum w^2
  double nonfinite;     // number of NaN and infinite elements
};
constexpr int kStepSums = 6;
static_assert(sizeof(StepSums) == kStepSums * sizeof(double), "a row of trajectory_step's result");

LIPCORE_INLINE void merge(StepSums* into, const StepSums& from) {
  into->dw_sq += from.dw_sq;
  into->dist_sq += from.dist_sq;
  into->m2_increment += from.m2_increment;
  if (from.max_abs_dw > into->max_abs_dw) into->max_abs_dw = from.max_abs_dw;
  into->weight_sq += from.weight_sq;
  into->nonfinite += from.nonfinite;
}

// A tensor's sums of a step that is left out because of non-finite elements: what they are without those says little of
// its update. The increment stays, since the mean has taken the point in.
LIPCORE_INLINE StepSums left_out(const StepSums& sums) {
  const double nan = static_cast<double>(NAN);
  return {nan, nan, sums.m2_increment, nan, nan, sums.nonfinite};
}

}  // namespace lipcore
