// The stateful hot path: parameters, the copies kept of them, and the ledger of their movement.
#pragma once

#include <memory>
#include <vector>

#include "ops/trajectory_step.h"
#include "trajectory/ledger.h"
#include "trajectory/movement_check.h"
#include "trajectory/parameter_list.h"

namespace lipcore {

namespace cuda {
class StepRunner;
}

// State tensors of one parameter, with its layout; strong references. m2 is None where no variance per element is kept.
struct TrajectoryCopies {
  PyObject* prev;
  PyObject* deviation;
  PyObject* m2;
};

class TrajectoryPlan {
 public:
  TrajectoryPlan() = default;
  TrajectoryPlan(const TrajectoryPlan&) = delete;
  TrajectoryPlan& operator=(const TrajectoryPlan&) = delete;
  ~TrajectoryPlan();

  // Takes over the references of entries and copies; `ledger` must outlive the plan. Parameters and state must be where
  // the ledger is. False with a Python exception set.
  bool capture(std::vector<ParameterEntry> entries, std::vector<TrajectoryCopies> copies, Ledger* ledger);

  // One optimizer step: reads every parameter, updates state and ledger. False with a Python exception set, nothing
  // written, when a parameter is gone or no longer fits its state. On a CUDA device the step is queued on torch's
  // current stream, and nothing about it is known here: restarts and counts come from the ledger there.
  //
  // With a check, on the CPU alone: what it has taken is compared with what the parameters did, before the copies
  // follow, in the same pass over memory, and let go.
  bool step(MovementCheck* check = nullptr);

  int64_t block = 0;      // steps in the open block; whoever calls step() folds it when it is full
  bool captured = false;  // a step was captured in a CUDA graph: its replays are not counted in the block

 private:
  bool look_up_all();
  bool admit(size_t i, const TensorView& view);
  void step_on_cpu(MovementCheck* check);
  bool step_on_device();

  ParameterList parameters_;
  std::vector<TrajectoryCopies> copies_;
  std::vector<TrajectoryItem> items_;
  std::vector<StepSums> sums_;
  std::vector<UpdateSums> update_sums_;
  Ledger* ledger_ = nullptr;
  bool moved_ = false;  // a pointer in items_ has changed since the last step on a CUDA device
  TrajectoryRunner runner_;
  std::shared_ptr<cuda::StepRunner> cuda_runner_;  // shared: it knows how to end what only a core with CUDA can see
};

}  // namespace lipcore
