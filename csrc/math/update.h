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

template <UpdateForm kForm>
struct Form {
  static constexpr UpdateForm value = kForm;
};
// Calls body with the run-time form as a type. A body is of the host or of the device, as its caller.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Body>
LIPCORE_INLINE auto with_form(UpdateForm form, const Body& body) {
  switch (form) {
    case UpdateForm::kOne:
      return body(Form<UpdateForm::kOne>{});
    case UpdateForm::kTwo:
      return body(Form<UpdateForm::kTwo>{});
    case UpdateForm::kAdaptive:
      return body(Form<UpdateForm::kAdaptive>{});
    default:
      return body(Form<UpdateForm::kHeld>{});
  }
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

// The root of the second moment without its bias, which divides the first.
template <class V>
LIPCORE_INLINE V second_root(V b, const UpdateCoefficients<V>& c) {
  return c.second_scale * square_root(b);
}

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
    const V direction = (c.first_scale * a) / (second_root(b, c) + c.eps);
    return {shrunk + c.rate * direction, direction};
  }
}

// Sums over the elements of one tensor, or of one chunk of it. Of `step`, m2_increment stays 0: a mean is what this way
// of knowing dw does without.
struct UpdateSums {
  StepSums step;
  double direction_sq;      // sum u^2; 0 where nothing is normalised
  double ratio_sq;          // sum g^2 / max(v, eps^2) of the gradient g and the second moment v without its bias
  double momentum_sq;       // of what is kept of past gradients: b of Nesterov's form, else a
  double second_moment_sq;  // sum b^2 of a second moment
  double unexplained_sq;    // sum ((w - w_prev) - dw)^2
};

LIPCORE_INLINE void merge(UpdateSums* into, const UpdateSums& from) {
  merge(&into->step, from.step);
  into->direction_sq += from.direction_sq;
  into->ratio_sq += from.ratio_sq;
  into->momentum_sq += from.momentum_sq;
  into->second_moment_sq += from.second_moment_sq;
  into->unexplained_sq += from.unexplained_sq;
}

// What is said of a tensor's step beside its row: a table has a row of each, with a column per tensor. NaN where a rule
// or an argument that is not there leaves one unknown, and where the tensor has an element that is not finite.
enum UpdateSquare : int {
  kNormalizedSquare,    // mean of u^2
  kRatioSquare,         // mean of g^2 / max(v, eps^2)
  kMomentumSquare,      // sum
  kSecondMomentSquare,  // sum
  kUnexplainedSquare,   // sum
  kUpdateSquares,
};

// The squares of a tensor of so many elements whose every element is finite. What a sum does not know is NaN already.
LIPCORE_INLINE void take_squares(const UpdateSums& sums, double elements, double* table, int64_t tensors,
                                 int64_t tensor) {
  const double nan = static_cast<double>(NAN);
  const bool finite = sums.step.nonfinite == 0;
  double* column = table + tensor;
  column[kNormalizedSquare * tensors] = finite ? sums.direction_sq / elements : nan;
  column[kRatioSquare * tensors] = finite ? sums.ratio_sq / elements : nan;
  column[kMomentumSquare * tensors] = finite ? sums.momentum_sq : nan;
  column[kSecondMomentSquare * tensors] = finite ? sums.second_moment_sq : nan;
  column[kUnexplainedSquare * tensors] = finite ? sums.unexplained_sq : nan;
}

// Makes NaN of the sums that this form, or an argument that is not there, leaves unknown.
LIPCORE_INLINE void leave_unknown(UpdateForm form, bool has_momentum, bool has_gradient, bool has_previous,
                                  UpdateSums* sums) {
  const double nan = static_cast<double>(NAN);
  const bool adaptive = form == UpdateForm::kAdaptive;
  if (!adaptive) sums->direction_sq = sums->second_moment_sq = nan;
  if (!adaptive || !has_gradient) sums->ratio_sq = nan;
  if (!adaptive && !has_momentum) sums->momentum_sq = nan;
  if (!has_previous) sums->unexplained_sq = nan;
}

// What is kept of the roots of such squares over a window: the last one, their sum, the largest, and their number. A
// table has a row of each, with a column per square.
constexpr int kRootRows = 4;

// NaN, for a step that knows none or was not finite, leaves all as it was.
LIPCORE_INLINE void observe_square(double* table, int64_t columns, int64_t column_of, double square) {
  const double root = square_root(square);
  if (!(root < static_cast<double>(INFINITY))) return;
  double* column = table + column_of;
  column[0] = root;
  column[columns] += root;
  column[2 * columns] = root > column[2 * columns] ? root : column[2 * columns];
  column[3 * columns] += 1;
}

}  // namespace lipcore
