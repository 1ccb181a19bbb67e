// How one optimizer step moved a parameter, from the parameter and the optimizer's state AFTER the step. Shared by
// every instruction set (V = a vector of 16 lanes) and fit for the device (V = float or double).
//
// A step w = w_prev - (shrink w_prev + s) has dw = -(shrink w + s) / (1 - shrink): no w_prev is needed, and no
// difference of nearly equal numbers is taken. The division is in the coefficients, so that dw = -(decay w + s) here.
#pragma once

#include <cmath>

#include "math/trajectory.h"

namespace lipcore {

// What s is made of: the optimizer's tensors a and b.
enum class UpdateForm : int32_t {
  kHeld,      // s = 0
  kOne,       // s = rate a: SGD; SGD with momentum (a its buffer); an update that is given (rate = -1)
  kTwo,       // s = rate a + mix b: Nesterov's momentum (a the gradient, b the buffer)
  kAdaptive,  // s = rate u, u = first_scale a / (second_scale sqrt(b) + eps): Adam, AdamW
};

LIPCORE_INLINE constexpr bool reads_first(UpdateForm form) { return form != UpdateForm::kHeld; }
LIPCORE_INLINE constexpr bool reads_second(UpdateForm form) {
  return form == UpdateForm::kTwo || form == UpdateForm::kAdaptive;
}

template <class V>
struct UpdateCoefficients {
  V rate, mix, decay, first_scale, second_scale, eps;
};

template <class V>
struct UpdateStep {
  V moved;      // -dw: only squares and absolute values are taken of it
  V direction;  // u: the normalised update
};

#if defined(__CUDACC__)
LIPCORE_INLINE float square_root(float x) { return sqrtf(x); }
LIPCORE_INLINE double square_root(double x) { return sqrt(x); }
#else
LIPCORE_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LIPCORE_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#endif

// Multiply, then add: never fused, so that every instruction set gives the same bits.
template <UpdateForm kForm, class V>
LIPCORE_INLINE UpdateStep<V> update_of(V w, V a, V b, const UpdateCoefficients<V>& c) {
  const V shrunk = c.decay * w;
  if constexpr (kForm == UpdateForm::kHeld) {
    return {shrunk, shrunk};
  } else if constexpr (kForm == UpdateForm::kOne) {
    return {shrunk + c.rate * a, shrunk};
  } else if constexpr (kForm == UpdateForm::kTwo) {
    return {(shrunk + c.rate * a) + c.mix * b, shrunk};
  } else {
    const V direction = (c.first_scale * a) / (c.second_scale * square_root(b) + c.eps);
    return {shrunk + c.rate * direction, direction};
  }
}

// Sums over the elements of one tensor, or of one chunk of it. Of `step`, dist_sq and m2_increment stay 0: a reference
// point and a mean are what this way of knowing dw does without.
struct UpdateSums {
  StepSums step;
  double direction_sq;  // sum u^2; 0 where nothing is normalised
};

LIPCORE_INLINE void merge(UpdateSums* into, const UpdateSums& from) {
  merge(&into->step, from.step);
  into->direction_sq += from.direction_sq;
}

// What is kept of a tensor's normalised updates over a window: the root mean square of the last one, their sum, the
// largest, and their number. A table has a row of each, with a column per tensor.
constexpr int kNormalizedRows = 4;

// NaN, for a step that normalised nothing or was not finite, leaves all as it was.
LIPCORE_INLINE void observe_normalized(double* table, int64_t tensors, int64_t tensor, double mean_square) {
  const double rms = square_root(mean_square);
  if (!(rms < static_cast<double>(INFINITY))) return;
  double* column = table + tensor;
  column[0] = rms;
  column[tensors] += rms;
  column[2 * tensors] = rms > column[2 * tensors] ? rms : column[2 * tensors];
  column[3 * tensors] += 1;
}

}  // namespace lipcore
