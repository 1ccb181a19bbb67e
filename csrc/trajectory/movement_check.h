// Movement that an optimizer did not make: what parameters did in a step, against what their optimizers' state says, in
// the pass over memory in which a trajectory takes the step.
#pragma once

#include <vector>

#include "ops/update_sums.h"

namespace lipcore {

class MovementCheck {
 public:
  MovementCheck() = default;
  MovementCheck(const MovementCheck&) = delete;
  MovementCheck& operator=(const MovementCheck&) = delete;
  ~MovementCheck();

  // `recent`: the ring float64 [steps, tensors, 2] on the CPU of what is left unexplained, squared, and of what
  // rounding may make of it, squared; `places`: which of the tensors are checked; `units_sq`: of each of those, the
  // square of the unit that rounding is measured in. False with a Python exception set.
  bool open(PyObject* recent, std::vector<int64_t> places, std::vector<double> units_sq);

  // Takes what moved the checked tensors in the step that was just made, one item per place; `holders` are objects that
  // keep their memory. False with a Python exception set, and nothing taken, when they do not belong together.
  bool take(std::vector<UpdateItem> items, const std::vector<PyObject*>& holders);

  // Whether something was taken that fits tensors of so many elements.
  bool fits(const std::vector<int64_t>& counts) const;

  // Lets go of what was taken.
  void drop();

  // By tensor: the item that was taken; null where it is not checked.
  const UpdateItem* const* items() const { return by_tensor_.data(); }

  // Writes the sums of the step, by tensor, into the ring's place for step number `step`.
  void write(const std::vector<UpdateSums>& sums, int64_t step);

 private:
  std::vector<int64_t> places_;
  std::vector<double> units_sq_;
  std::vector<UpdateItem> items_;
  std::vector<const UpdateItem*> by_tensor_;
  std::vector<PyObject*> held_;
  PyObject* recent_ = nullptr;
  double* ring_ = nullptr;
  int64_t steps_ = 0, tensors_ = 0;
};

}  // namespace lipcore
