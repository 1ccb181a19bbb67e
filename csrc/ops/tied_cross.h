// The inner product of both gradients of a weight that is an embedding and the head.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

// sum_{s,t} G[b, s, ids_bt] <x_bs, e_bt>: ids [B, T] int64, dense, e [B, T, D], x [B, S, D] and G [B, S, V] with flat
// rows, out float64 [B].
bool tied_cross(const TensorView& ids, const TensorView& grad_embedding, const TensorView& x,
                const TensorView& grad_head, const int64_t* padding, const TensorView& out);

}  // namespace lipcore
