// What is kept of a stream of values >= 0 beside its histogram, and which values count. Host and device. A zeroed row
// is the identity of merge.
#pragma once

#include <cmath>

#include "math/log_bins.h"
#include "math/moments.h"

namespace lipcore {

struct ObservedRow {
  Moments moments;
  double missing = 0;  // NaN: no value
  double invalid = 0;  // infinite or negative; they enter nothing else
};
constexpr int kObservedColumns = 7;
static_assert(sizeof(ObservedRow) == kObservedColumns * sizeof(double), "a row of observe_rows()");

// Returns the bin that the value is to be counted in; -1 for none.
LIPCORE_INLINE int observe(ObservedRow* row, double x) {
  if (x != x) {
    row->missing += 1;
    return -1;
  }
  if (!(x >= 0 && x < static_cast<double>(INFINITY))) {
    row->invalid += 1;
    return -1;
  }
  observe(&row->moments, x);
  return bin_of(x);
}

LIPCORE_INLINE void merge(ObservedRow* into, const ObservedRow& from) {
  merge(&into->moments, from.moments);
  into->missing += from.missing;
  into->invalid += from.invalid;
}

// numerator / |gradient|: NaN where the gradient is 0, not finite, or below `smallest` (one that is subnormal in its
// dtype has lost digits).
LIPCORE_INLINE double usable_ratio(double numerator, double gradient, double smallest) {
  const double size = fabs(gradient);
  const bool usable = size > 0 && size >= smallest && size < static_cast<double>(INFINITY);
  return usable ? numerator / size : static_cast<double>(NAN);
}

// What is observed of a table's numbers.
enum class Observable : int32_t { kValues, kRoots, kRatios };

// A table [places, B] of any dtype and strides, and what is observed of it: its values, their roots, or their ratios to
// gradient[b], float64 [B].
struct ObservedTable {
  const void* values;
  DType dtype;
  int64_t places, count;
  int64_t place_stride, stride;
  Observable what;
  const double* gradient;  // null but for ratios
  int64_t gradient_stride;
  double smallest;  // gradient that is used
};

LIPCORE_INLINE double observable_of(Observable what, double x, double gradient, double smallest) {
  if (what == Observable::kValues) return x;
  return what == Observable::kRoots ? sqrt(x) : usable_ratio(x, gradient, smallest);
}

}  // namespace lipcore
