// Norms at a chain's first layer: of the gradient at its output, and of what it pulls back to the input.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

// The batch-1 shortcut: r = ||delta|| / |output_grad| and lambda = ||W^T delta|| / |output_grad| of one sample, in
// float64, NaN when output_grad is 0 or not finite. delta has O elements, output_grad one, weight is [O, I]; all on the
// CPU.
bool sample_ratio(const TensorView& delta, const TensorView& output_grad, const TensorView& weight, double* r,
                  double* lambda);

// out[0, b] = out[2, b] = ||delta[b]||, out[1, b] = ||W^T delta[b]||, in float64; delta [B, O], weight [O, I]. A plain
// loop that beats the calls around a matrix product up to a few thousand multiplications; larger ones belong to
// torch.mm.
bool first_layer_norms(const TensorView& delta, const TensorView& weight, const TensorView& out);

}  // namespace lipcore
