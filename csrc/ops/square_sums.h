// Sums of squares of many tensors at once.
#pragma once

#include <vector>

#include "math/trajectory.h"
#include "python/tensor_view.h"

namespace lipcore {

// out[i] = the step of a tensor that moved by tensors[i] (of gradients: their norms in the columns of a trajectory):
// dw_sq and weight_sq its sum of squares, NaN with the count where there are NaN or infinite elements; zeros for an
// empty one. Dense, all on the device where `out` is.
bool square_sums(const std::vector<TensorView>& tensors, StepSums* out, dlpack::Device device = {dlpack::kCPU, 0});

}  // namespace lipcore
