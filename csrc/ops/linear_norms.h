// Per-sample gradient norms of Linear layers with several tokens per sample.
#pragma once

#include "ops/offsets.h"
#include "python/tensor_view.h"

namespace lipcore {

// kRedo, of a CUDA device: only samples whose out, made elsewhere of float32 sums, left their range.
enum class LinearMethod : int { kChoose = 0, kGram = 1, kDirect = 2, kRedo = 3 };
constexpr int kLinearMethods = 4;

// The cheaper method; direct unless Gram is clearly so, because Gram cancels.
LinearMethod linear_method(int64_t tokens, int64_t inputs, int64_t outputs, bool on_cpu);

// out[b] = ||grad_b^T x_b||_F^2, float64. x [B, T, I] and grad [B, T, O], or, packed, [N, I] and [N, O] with offsets;
// on the CPU of one dtype with contiguous last dimensions. On a CUDA device packed samples are made directly. With
// `total` also the batch's weight gradient, [O, I] in float32, or in float64 if x is.
bool linear_norms(const TensorView& x, const TensorView& grad, Offsets offsets, LinearMethod method,
                  const TensorView& out, const TensorView* total);

}  // namespace lipcore
