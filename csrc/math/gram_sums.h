// What the Gram form of a squared norm adds up, and when its result can be trusted. For host and device.
#pragma once

#include <cmath>

#include "math/dtype.h"

namespace lipcore {

struct GramSums {
  double total;              // of the products of both Gram matrices, elements off the diagonal twice
  double diagonal, x, grad;  // over the diagonal alone: of the products and of each matrix
};

// False where terms cancelled so far that Gram's error exceeds 1e-5, or where sums left the range of float32 (of
// float64 if `in_float64`).
LIPCORE_INLINE bool gram_holds(const GramSums& sums, double tokens, double inputs, double outputs, bool in_float64) {
  constexpr double kCancelled = 5e-3;
  const double lost = in_float64 ? 1e-307 : 1e-37;
  const double underflow = lost * tokens * (inputs * sums.grad + outputs * sums.x + tokens);
  return std::isfinite(sums.total) && sums.total >= kCancelled * sums.diagonal && underflow <= 1e-7 * sums.total;
}

}  // namespace lipcore
