// Running means of a long window, block by block.
#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

// Merges blocks of a long window: earlier[i] becomes the mean of both, mean[i] weighing share[i], and gap_sq[i] is how
// far apart they were, squared. mean is float32 or float64, earlier float64: in float32 the roundings of two thousand
// merges would be 8e-6 of the variance. Dense, all on one device, where share and gap_sq are too; every 512 steps, so a
// plain loop is enough.
bool fold_means(const std::vector<TensorView>& mean, const std::vector<TensorView>& earlier, const double* share,
                double* gap_sq, dlpack::Device device);

}  // namespace lipcore
