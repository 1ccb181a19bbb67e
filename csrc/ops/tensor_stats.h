// Statistics and histograms of the elements of many tensors at once, added to those that are there.
#pragma once

#include <vector>

#include "math/tensor_stats.h"
#include "ops/rows.h"
#include "python/tensor_view.h"

namespace lipcore {

// A tensor, as one row, and where it goes.
struct TensorStatsItem {
  Rows rows;
  int64_t place;
};

// Adds tensor i to row places[i] of rows, float64 [n, kTensorStats], and of bins, int64 [n, kTensorBins]: dense, on the
// device of the tensors, which have any strides. False with a Python exception set, and nothing written, where an
// argument is wrong; places that come twice are.
bool tensor_stats(const std::vector<TensorView>& tensors, const std::vector<int64_t>& places, const TensorView& rows,
                  const TensorView& bins);

// Merges row i of other_rows and other_bins into row places[i] of rows and bins; a place may come more than once, and
// one below 0 takes nothing. All on the CPU. With `gone` what is merged leaves the other table, whose counts were made
// by tensor_stats.
bool merge_tensor_stats(const TensorView& other_rows, const TensorView& other_bins, const std::vector<int64_t>& places,
                        const TensorView& rows, const TensorView& bins, bool gone);

}  // namespace lipcore
