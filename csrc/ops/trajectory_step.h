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
// A tensor with non-finite values keeps its w_prev and mean: its elements are checked before any of them is written.
class TrajectoryRunner {
 public:
  void plan(const std::vector<int64_t>& counts);
  void run(const TrajectoryItem* items, StepSums* sums);
  int64_t total() const { return total_; }

 private:
  struct Chunk {
    int64_t item, begin, count;
  };
  // Tensors whose elements stay in a core's cache between the check and the step are one task; larger ones are checked
  // and stepped chunk by chunk, a group at a time, so that the second reading comes from the shared cache.
  struct Group {
    int64_t first_item, last_item;    // items [first, last)
    int64_t first_chunk, last_chunk;  // their chunks
  };
  std::vector<int64_t> first_chunk_;  // per item, and the end
  std::vector<Chunk> chunks_;
  std::vector<StepSums> partials_;  // per chunk
  std::vector<int64_t> solo_;       // items that are one task
  std::vector<Group> groups_;
  int64_t total_ = 0;

  void check(const TrajectoryItem& item, int64_t chunk);
  void step(const TrajectoryItem& item, int64_t chunk);
  bool settle(int64_t item);  // false when the item has non-finite values; then its partials say how many
};

// The stateless form: all lists of n tensors, out float64 [n, 6] (the columns of StepSums), count >= 1.
bool trajectory_step(const std::vector<TensorView>& params, const std::vector<TensorView>& prev,
                     const std::vector<TensorView>& ref, const std::vector<TensorView>& mean, int64_t count,
                     const TensorView& out);

}  // namespace lipcore
