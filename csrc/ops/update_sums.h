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

// rows float64 [n, 6] (the columns of StepSums), squares float64 [kUpdateSquares, n] (see UpdateSquare). A tensor with
// a non-finite element of w or of the update has a row of NaN with the number of such elements. All on one device.
// Returns false with a Python exception set, and nothing written, when an argument is wrong.
bool update_sums(const std::vector<UpdateItem>& items, const TensorView& rows, const TensorView& squares);

// Takes the squares of a step, float64 [n], into the table of their roots, float64 [kRootRows, n].
bool observe_squares(const TensorView& squares, const TensorView& table);

}  // namespace lipcore
