// One step of many tensors: how far each moved, and how far it is from its mean so far.
#pragma once

#include <vector>

#include "kernels.h"
#include "ops/update_sums.h"
#include "python/tensor_view.h"

namespace lipcore {

// One tensor of a trajectory step: flat memory throughout.
struct TrajectoryItem {
  const void* w;
  void* w_prev;
  void* deviation;
  void* m2;  // may be null
  int64_t count;
  DType dtype;
  bool restart;
  double share;
};

// Runs one step over a fixed list of tensors. The chunk table is made once (plan) and reused; run() allocates nothing.
class TrajectoryRunner {
 public:
  void plan(const std::vector<int64_t>& counts);
  void run(const TrajectoryItem* items, StepSums* sums);
  // The same, with the sums of `updates` where there is one of an item, before w_prev follows: chunk by chunk, so that
  // memory which both read comes out of a cache the second time. The bits are those of update_sums().
  void run(const TrajectoryItem* items, StepSums* sums, const UpdateItem* const* updates,
           std::vector<UpdateSums>* update_sums);
  int64_t total() const { return total_; }
  std::vector<int64_t> counts() const;

 private:
  struct Chunk {
    int64_t item, begin, count;
  };
  std::vector<int64_t> first_chunk_;  // per item, and the end
  std::vector<Chunk> chunks_;
  std::vector<StepSums> partials_;  // per chunk
  std::vector<UpdateSums> update_partials_;
  int64_t total_ = 0;

  void step(const TrajectoryItem& item, int64_t chunk);
  void merge_chunks(StepSums* sums) const;
};

// The stateless form: all lists of n tensors, out float64 [n, 5] (the columns of StepSums), count >= 1.
bool trajectory_step(const std::vector<TensorView>& params, const std::vector<TensorView>& prev,
                     const std::vector<TensorView>& deviation, int64_t count, const TensorView& out);

}  // namespace lipcore
