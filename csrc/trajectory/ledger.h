// The scalars of a trajectory: one row per tensor, per group and for the total, and a ring of the most recent steps.
// Both are tensors that belong to Python; this object only writes to them.
#pragma once

#include <vector>

#include "math/trajectory_row.h"
#include "python/tensor_view.h"

namespace lipcore {

class Ledger {
 public:
  Ledger() = default;
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;
  ~Ledger();

  // rows float64 [tensors + groups + 1, kTrajectoryColumns], recent float64 [ring, tensors + groups + 1, 2], cursor
  // float64 [2]. The column `group` of each tensor's row says which group it adds to. False with a Python exception
  // set.
  bool open(PyObject* rows, PyObject* recent, PyObject* cursor, int64_t tensors);

  // One step of all tensors: their rows, their groups', the total's and the ring's next place. CPU only.
  void observe(const StepSums* sums);

  // The same from a tensor float64 [tensors, kStepSums], on either device.
  bool observe_tensor(PyObject* sums);

  const LedgerTables& tables() const { return tables_; }
  const TrajectoryRow& row(size_t i) const { return tables_.rows[i]; }
  dlpack::Device device() const { return device_; }
  bool on_cpu() const { return device_.type == dlpack::kCPU; }

 private:
  LedgerTables tables_{};
  dlpack::Device device_{dlpack::kCPU, 0};
  std::vector<StepSums> group_sums_;
  PyObject* owned_[3] = {};
};

}  // namespace lipcore
