// Norms of the rows of a [B, ...] tensor with any strides, and of single ones for operations that combine them.
#pragma once

#include "ops/rows.h"
#include "python/tensor_view.h"

namespace lipcore {

// out[b] = ||x[b]||_2; x [B, ...] with any strides, out float64 [B].
bool sample_norms(const TensorView& x, const TensorView& out);

// r[b] = ||delta[b]||_2 / |output_grad[b]|, NaN where output_grad[b] is 0 or not finite; *skipped counts those.
// delta [B, ...], output_grad with B elements, r float64 [B].
bool normalized_norms(const TensorView& delta, const TensorView& output_grad, const TensorView& r, int64_t* skipped);

// x [B, ...] of at least one dimension; false when a row has more than kRowDims dimensions that cannot be merged.
bool describe_rows(const TensorView& x, Rows* rows);

// Elements [begin, begin + count) of a row, at most kChunk, as a flat run: in place, or gathered into a buffer of this
// thread.
const void* row_run(const Rows& rows, int64_t row, int64_t begin, int64_t count);

// Sum of squares of a row, in float64; of a float64 row it may have under- or overflowed.
double sum_squares_of_row(const Rows& rows, int64_t row);

// The norm, given that sum; scaled where the squares of float64 left its range.
double norm_of_row(const Rows& rows, int64_t row, double sum);

}  // namespace lipcore
