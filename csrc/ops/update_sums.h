// Sums of an optimizer step's updates, computed from the optimizer's state: what the binding hands over.
#pragma once

#include <vector>

#include "kernels.h"
#include "python/tensor_view.h"

namespace lipcore {

// A tensor of the list, with what the step's rule needs of the optimizer. Views of tensors that are not there are
// empty.
struct UpdateItem {
  TensorView w, first, second;
  bool has_first, has_second;
  bool adaptive;
  UpdateScalars scalars;
  TensorView scalar_at[6];  // those that lie on the tensors' device, in the order of scalars; else without data
};

UpdateForm form_of(const UpdateItem& item);

// rows float64 [n, 6] (the columns of StepSums), normalized float64 [n]: the mean square of the normalised update, NaN
// for a rule that normalises nothing. A tensor with a non-finite element of w or of the update has a row of NaN with
// the number of such elements. All on one device. Returns false with a Python exception set, and nothing written, when
// an argument is wrong.
bool update_sums(const std::vector<UpdateItem>& items, const TensorView& rows, const TensorView& normalized);

// Takes the mean squares of a step, float64 [n], into the table of normalised updates, float64 [kNormalizedRows, n].
bool observe_normalized(const TensorView& mean_square, const TensorView& table);

}  // namespace lipcore
