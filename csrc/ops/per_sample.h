// Squared norms of per-sample gradients of layers that need no matrix product, and their helpers.
#pragma once

#include <vector>

#include "kernels.h"
#include "python/tensor_view.h"

namespace lipcore {

// out[0, l, b] = ||x_l[b]||^2 ||grad_l[b]||^2, and out[1, l, b] = ||grad_l[b]||^2 where out has two slices; out
// float64 [1 or 2, layers, B].
bool outer_norms(const std::vector<TensorView>& x, const std::vector<TensorView>& grad, const TensorView& out);

enum class Terms { kShift = 0, kScale = 1, kBoth = 2 };

// Samples of packed rows: int64 offsets, their bits in a float64 tensor because the gatekeeper knows floating types.
struct Offsets {
  const int64_t* begin = nullptr;  // null: not packed
  int64_t samples = 0;
};

// Checks that the offsets ascend from 0 to `rows`.
bool read_offsets(const TensorView& offsets, int64_t rows, Offsets* out);

// Squared norms of sum_t g_bt (kShift), sum_t g_bt * x_bt (kScale), or scale and shift (kBoth, in this order).
// grad [B, T, F], or [1, N, F] with offsets; either its rows or its columns are flat runs. x is of the same shape,
// dtype and orientation; null for kShift. out float64 [1 or 2, B].
bool row_sum_norms(const TensorView& grad, const TensorView* x, Offsets offsets, Terms terms, const TensorView& out);

// sum over tokens v of ||sum_{t: ids_bt = v} w_bt g_bt||^2. ids [B, T] or [1, N] int64 bits, grad [.., .., D] with flat
// rows, weights float64 like ids or null, out float64 [B]. Rows whose id is *padding do not count.
bool embedding_norms(const TensorView& ids, const TensorView& grad, const TensorView* weights, const int64_t* padding,
                     Offsets offsets, const TensorView& out);

// sum_{s,t} G[b, s, ids_bt] <x_bs, e_bt>: ids [B, T] int64 bits, e [B, T, D], x [B, S, D] and G [B, S, V] with flat
// rows, out float64 [B].
bool tied_cross(const TensorView& ids, const TensorView& grad_embedding, const TensorView& x,
                const TensorView& grad_head, const int64_t* padding, const TensorView& out);

}  // namespace lipcore
