#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

// A convolution's sizes as Python has them: one number per spatial dimension of x.
struct ConvGeometry {
  std::vector<int64_t> kernel, stride, padding, dilation;
  int64_t groups;
};

// out[b] = squared norm of the weight gradient of sample b; x [B, C, ...], grad [B, O, ...] with at most the output's
// spatial sizes, out float64 [B]. All on one device, any strides. `gram`: of pixels on the CPU, of patches elsewhere.
bool conv_norms_sq(const TensorView& x, const TensorView& grad, const ConvGeometry& geometry, bool gram,
                   const TensorView& out);

}  // namespace lipcore
