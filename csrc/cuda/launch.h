// The CUDA twins of csrc/ops: checked arguments in, kernels queued on torch's current stream, nothing waited for. Every
// function returns false with a Python exception set that says what was being done, on which device, and CUDA's words.
// Squares and sums are float64; results depend neither on the GPU nor on alignment (cuda/*.cu say more).
#pragma once

#include <vector>

#include "cuda/kernels.h"
#include "cuda/sketch_runner.h"
#include "cuda/torch_memory.h"
#include "ops/sample_norms.h"
#include "ops/tensor_stats.h"
#include "ops/trajectory_step.h"

namespace lipcore::cuda {

// 0 without a GPU or a driver.
int device_count();

bool sample_norms(const Rows& rows, dlpack::Device device, double* out);

bool row_sum_norms(const RowSums& sums, dlpack::Device device, double* out);

// Whether weight_norms multiplies 16-bit numbers on tensor cores there; false with an exception set where it cannot
// say.
bool multiplies_16_bit(dlpack::Device device, bool* does);

// Says itself whether tensor cores are there.
bool weight_norms(WeightNorms norms, dlpack::Device device, double* out);
bool redo_weight_norms(const WeightNorms& norms, dlpack::Device device, double* out);

bool embedding_norms(const EmbeddingNorms& norms, dlpack::Device device, double* out);

// Of dense tensors.
bool tensor_stats(const std::vector<TensorStatsItem>& items, dlpack::Device device, TensorStats* rows, int64_t* bins);

bool trajectory_step(const std::vector<TrajectoryItem>& items, dlpack::Device device, StepSums* out);

bool observe_sums(const LedgerTables& ledger, const StepSums* sums, dlpack::Device device);

bool observe_rows(const ObservedTable& table, dlpack::Device device, ObservedRow* rows, int64_t* bins);

// The stateful form: tables on the device are made once, and the ledger, which is there too, tells each step whether it
// is the first of a window. So a step depends on nothing on the host but the pointers: it can be captured in a CUDA
// graph.
class StepRunner {
 public:
  bool plan(const std::vector<TrajectoryItem>& items, dlpack::Device device, const LedgerTables& ledger);

  // `moved` when a pointer in items has changed since the last call (restart and share are not looked at).
  // Allocates nothing.
  bool step(const std::vector<TrajectoryItem>& items, bool moved);

  // A step was captured in a CUDA graph, whose replays nobody tells of.
  bool captured() const { return captured_; }

 private:
  dlpack::Device device_{};
  std::vector<TensorEntry> entries_;
  StepTables tables_{};
  TorchMemory memory_;
  bool stale_ = false;  // the tables on the device may hold other pointers than entries_
  bool captured_ = false;
};

}  // namespace lipcore::cuda
