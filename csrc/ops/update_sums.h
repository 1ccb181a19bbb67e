// Sums of an optimizer step's updates, computed from the optimizer's state: what the binding hands over.
#pragma once

#include <vector>

#include "kernels.h"
#include "python/tensor_view.h"

namespace lipcore {

// A tensor of the list, with what the step's rule needs of the optimizer. Views of tensors that are not there are
// empty.
struct UpdateItem {
  TensorView w, first, second, gradient, previous;
  bool has_first, has_second, has_gradient, has_previous;
  bool adaptive, has_momentum;
  UpdateScalars scalars;
  TensorView scalar_at[6];  // those that lie on the tensors' device, in the order of scalars; else without data
};

UpdateForm form_of(const UpdateItem& item);

// Whether all tensors of each item belong together, and all items on one device; else false with a Python exception.
bool check_update_items(const std::vector<UpdateItem>& items);

// Of the elements [begin, begin + count) of a tensor on the CPU, at most kChunk: sums, with the number of elements that
// are not finite where a sum is not.
void sum_update_run(const UpdateItem& item, int64_t begin, int64_t count, UpdateSums* sums);

// A tensor's row from the sums over its runs: NaN but for the number where elements are not finite.
StepSums update_row(const UpdateSums& sums);

// rows float64 [n, 5] (the columns of StepSums), squares float64 [kUpdateSquares, n] (see UpdateSquare). A tensor with
// a non-finite element of w or of the update has a row of NaN with the number of such elements. All on one device.
// Returns false with a Python exception set, and nothing written, when an argument is wrong.
bool update_sums(const std::vector<UpdateItem>& items, const TensorView& rows, const TensorView& squares);

// Takes the squares of a step, float64 [n], into the table of their roots, float64 [kRootRows, n].
bool observe_squares(const TensorView& squares, const TensorView& table);

}  // namespace lipcore
