// Running means of a long window, block by block.
#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

// The means of offsets from a reference over a block of steps, as a trajectory's step leaves them: mean_offset(). last
// and reference are in the parameter's dtype, deviation is float32, or float64 for float64.
struct BlockMeans {
  std::vector<TensorView> last, reference, deviation;
};

// Merges blocks of a long window: earlier[i] becomes the mean of both, the block's weighing share[i], and gap_sq[i] is
// how far apart they were, squared. earlier is float64: in float32 the roundings of two thousand merges would be 8e-6
// of the variance. Dense, all on one device, where share and gap_sq are too; every 512 steps, so a plain loop is
// enough.
bool fold_means(const BlockMeans& block, const std::vector<TensorView>& earlier, const double* share, double* gap_sq,
                dlpack::Device device);

}  // namespace lipcore
