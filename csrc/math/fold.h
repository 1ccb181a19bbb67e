// Running means of a long window, block by block. Host and device.
#pragma once

#include "math/dtype.h"

namespace lipcore {

// The mean of a block's offsets from a reference point: `deviation` is how far its last point lies from its mean.
LIPCORE_INLINE double mean_offset(double last, double reference, double deviation) {
  return (last - reference) - deviation;
}

// `earlier` becomes the mean of both, `mean` weighing `share`. Returns how far apart they were, squared.
LIPCORE_INLINE double fold_mean(double mean, double* earlier, double share) {
  const double gap = mean - *earlier;
  // From the nearer end, so that a share of one gives the mean itself.
  *earlier = share < 0.5 ? *earlier + share * gap : mean - gap * (1 - share);
  return gap * gap;
}

}  // namespace lipcore
