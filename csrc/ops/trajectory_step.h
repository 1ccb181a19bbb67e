// One step of many tensors: how far each moved, and how far it is from where it began.
#pragma once

#include <vector>

#include "kernels.h"
#include "python/tensor_view.h"

namespace lipcore {

// One tensor of a trajectory step: flat memory throughout.
struct TrajectoryItem {
  const void* w;
  void* w_prev;
  const void* w0;
  void* mean;
  void* m2;  // may be null
  int64_t count;
  DType dtype;
  bool restart;
  double inv_count;
};

// Runs one step over a fixed list of tensors. The chunk table is made once (plan) and reused; run() allocates nothing.
class TrajectoryRunner {
 public:
  void plan(const std::vector<int64_t>& counts);
  void run(const TrajectoryItem* items, StepSums* sums);
  int64_t total() const { return total_; }

 private:
  struct Chunk {
    int64_t item, begin, count;
  };
  std::vector<int64_t> first_chunk_;  // per item, and the end
  std::vector<Chunk> chunks_;
  std::vector<StepSums> partials_;  // per chunk
  int64_t total_ = 0;

  void step(const TrajectoryItem& item, int64_t chunk);
};

// The stateless form: all lists of n tensors, out float64 [n, 6] (the columns of StepSums), count >= 1.
bool trajectory_step(const std::vector<TensorView>& params, const std::vector<TensorView>& prev,
                     const std::vector<TensorView>& ref, const std::vector<TensorView>& mean, int64_t count,
                     const TensorView& out);

}  // namespace lipcore
