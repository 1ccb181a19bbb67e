// The stateful hot path: which parameters, where their state lives, and what is remembered of them. Parameters are
// looked up by (owner's _parameters dict, key) at every step, so objects that were replaced are seen.
#pragma once

#include <string>
#include <vector>

#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif
#include "math/ledger.h"
#include "ops/ops.h"

namespace lipcore {

struct TrajectoryEntry {
  PyObject* owner;   // dict; strong reference
  PyObject* key;     // str; strong reference
  std::string name;  // canonical, for messages
  PyObject* prev;    // state tensors with the parameter's layout; strong references
  PyObject* ref;
  PyObject* mean;
  int64_t group;  // index of the ledger row it adds to, after the tensors' rows
};

class TrajectoryPlan {
 public:
  TrajectoryPlan() = default;
  TrajectoryPlan(const TrajectoryPlan&) = delete;
  TrajectoryPlan& operator=(const TrajectoryPlan&) = delete;
  ~TrajectoryPlan();

  // Takes over the entries' references. `ledger` is float64 [tensors + groups + 1, kTrajectoryColumns], contiguous; its
  // last row is the total. Parameters and state must be where it is. False with a Python exception set.
  bool capture(std::vector<TrajectoryEntry> entries, int64_t groups, PyObject* ledger);

  // One optimizer step: reads every parameter, updates state and ledger. False with a Python exception set, nothing
  // written, when a parameter is gone or no longer fits its state. On a CUDA device the step is queued on torch's
  // current stream, and nothing about it is known here: restarts and counts come from the ledger there.
  bool step();

  int64_t block = 0;  // steps in the open block; whoever calls step() folds it when it is full

 private:
  struct Seen {  // what a parameter looked like when it was last checked in full
    const void* data = nullptr;
    uint64_t geometry = 0;
  };
  bool look_up(size_t i, std::vector<PyObject*>* held);
  bool step_on_cpu();
  bool step_on_device();
  bool admit(size_t i, PyObject* parameter, const TensorView& view, uint64_t geometry);

  std::vector<TrajectoryEntry> entries_;
  std::vector<Seen> seen_;
  std::vector<TrajectoryItem> items_;
  std::vector<StepSums> sums_;
  std::vector<StepSums> group_sums_;
  std::vector<PyObject*> held_;
  PyObject* ledger_ = nullptr;
  TrajectoryRow* rows_ = nullptr;
  dlpack::Device device_{dlpack::kCPU, 0};
  bool moved_ = false;  // a pointer in items_ has changed since the last step on a CUDA device
  TrajectoryRunner runner_;
#if defined(LIPCORE_WITH_CUDA)
  cuda::StepRunner cuda_runner_;
#endif
};

}  // namespace lipcore
