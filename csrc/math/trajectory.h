// One parameter's movement in one optimizer step, and the sums kept of it. Shared by the CPU kernels (V = a vector of
// 16 lanes) and the CUDA kernels (V = float or double).
//
// The mean is not kept itself: a weight of 1 that moves by 1e-6 would lose its movement in a float32 mean. What is kept
// is how far the last point lies from it, which is as small as the movement. Adding the step, which is exact
// (Sterbenz), gives how far the next point lies from the same mean; and what the mean then comes nearer by, that point
// takes off.
#pragma once

#include <cmath>

#include "math/dtype.h"

namespace lipcore {

template <class V>
struct Movement {
  V step;             // w - w_prev
  V deviation;        // w - the mean of the points before
  V deviation_after;  // w - the mean of the points, this one included
};

// Welford's update. `deviation` is w_prev - the mean of the points before, whose share in the new mean is `share`. No
// product is added to anything, so every instruction set gives the same bits.
template <class V>
LIPCORE_INLINE Movement<V> observe_movement(V w, V w_prev, V deviation, V share) {
  Movement<V> m;
  m.step = w - w_prev;
  m.deviation = m.step + deviation;
  m.deviation_after = m.deviation * share;
  return m;
}

// Sums over the elements of one tensor (or of one chunk of it) for one step. All float64; an empty one is the identity
// of merge. A non-finite element counts as what it was before, w_prev, so that the state stays as it would be had it
// stood still.
struct StepSums {
  double dw_sq;         // sum (w - w_prev)^2
  double m2_increment;  // sum (w - old mean)(w - new mean)
  double max_abs_dw;    // max |w - w_prev|
  double weight_sq;     // sum w^2
  double nonfinite;     // number of NaN and infinite elements
};
constexpr int kStepSums = 5;
static_assert(sizeof(StepSums) == kStepSums * sizeof(double), "a row of trajectory_step's result");

LIPCORE_INLINE void merge(StepSums* into, const StepSums& from) {
  into->dw_sq += from.dw_sq;
  into->m2_increment += from.m2_increment;
  if (from.max_abs_dw > into->max_abs_dw) into->max_abs_dw = from.max_abs_dw;
  into->weight_sq += from.weight_sq;
  into->nonfinite += from.nonfinite;
}

// A tensor's sums of a step that is left out because of non-finite elements: what they are without those says little of
// its update. The increment stays, since the mean has taken the point in.
LIPCORE_INLINE StepSums left_out(const StepSums& sums) {
  const double nan = static_cast<double>(NAN);
  return {nan, sums.m2_increment, nan, nan, sums.nonfinite};
}

}  // namespace lipcore
