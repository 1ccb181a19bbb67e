// Norms of single rows of a [B, ...] tensor with any strides, for operations that combine them.
#pragma once

#include "ops/rows.h"
#include "python/tensor_view.h"

namespace lipcore {

// x [B, ...] of at least one dimension; false when a row has more than kRowDims dimensions that cannot be merged.
bool describe_rows(const TensorView& x, Rows* rows);

// Sum of squares of a row, in float64; of a float64 row it may have under- or overflowed.
double sum_squares_of_row(const Rows& rows, int64_t row);

// The norm, given that sum; scaled where the squares of float64 left its range.
double norm_of_row(const Rows& rows, int64_t row, double sum);

}  // namespace lipcore
