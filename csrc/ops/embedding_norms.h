// Norms of gradients of embeddings.
#pragma once

#include "ops/offsets.h"
#include "python/tensor_view.h"

namespace lipcore {

// sum over tokens v of ||sum_{t: ids_bt = v} w_bt g_bt||^2. ids [B, T] or [1, N] int64, dense, grad [.., .., D] with
// flat rows, weights float64 like ids or null, out float64 [B]. Rows whose id is *padding do not count. On a CUDA
// device ids are sorted, and order has the row of each; those of equal ones ascend. There grad has any strides.
bool embedding_norms(const TensorView& ids, const TensorView* order, const TensorView& grad, const TensorView* weights,
                     const int64_t* padding, Offsets offsets, const TensorView& out);

}  // namespace lipcore
