// What stands between the bindings and the kernels: shapes are checked, work is cut into fixed chunks and spread over
// threads, partial results are added in a fixed order. Every function returns false with a Python exception set when an
// argument is wrong, before anything is written.
#pragma once

#include <vector>

#include "kernels.h"
#include "python/tensor_view.h"

namespace lipcore {

// Below this many elements a call stays on its thread and keeps the GIL: a fork-join costs more than the work.
constexpr int64_t kSerialElements = 65536;

// out[b] = ||x[b]||_2; x [B, ...] with any strides, out float64 [B].
bool sample_norms(const TensorView& x, const TensorView& out);

// r[b] = ||delta[b]||_2 / |output_grad[b]|, NaN where output_grad[b] is 0 or not finite; *skipped counts those.
// delta [B, ...], output_grad with B elements, r float64 [B].
bool normalized_norms(const TensorView& delta, const TensorView& output_grad, const TensorView& r, int64_t* skipped);

// The batch-1 shortcut: r = ||delta|| / |output_grad| and lambda = ||W^T delta|| / |output_grad| of one sample, in
// float64, NaN when output_grad is 0 or not finite. delta has O elements, output_grad one, weight is [O, I]; all on the
// CPU.
bool sample_ratio(const TensorView& delta, const TensorView& output_grad, const TensorView& weight, double* r,
                  double* lambda);

// out[0, b] = out[2, b] = ||delta[b]||, out[1, b] = ||W^T delta[b]||, in float64; delta [B, O], weight [O, I]. A plain
// loop that beats the calls around a matrix product up to a few thousand multiplications; larger ones belong to
// torch.mm.
bool first_layer_norms(const TensorView& delta, const TensorView& weight, const TensorView& out);

// out[i] = the step of a tensor that moved by tensors[i] (of gradients: their norms in the columns of a trajectory):
// dw_sq and weight_sq its sum of squares, NaN with the count where there are NaN or infinite elements. Dense, on the
// CPU.
bool square_sums(const std::vector<TensorView>& tensors, StepSums* out);

// Merges blocks of a long window: earlier[i] becomes the mean of both, mean[i] weighing share[i], and gap_sq[i] is how
// far apart they were, squared. mean is float32 or float64, earlier float64: in float32 the roundings of two thousand
// merges would be 8e-6 of the variance. Dense, on the CPU; every 512 steps, so a plain loop is enough.
bool fold_means(const std::vector<TensorView>& mean, const std::vector<TensorView>& earlier, const double* share,
                double* gap_sq);

// Turns steps of the noise scale, pending[k] = [mean of the samples' squared gradient norms, squared norm of the mean
// gradient] in all places, into out[k] = [1, estimate of |G|^2, estimate of tr(Sigma)], zeros where a step is not
// usable, and lets ema [4, places] (total weight, both averages, steps) go on by them. Steps of the same number of
// samples, > 1.
bool noise_steps(const std::vector<TensorView>& pending, double samples, double decay, const TensorView& ema,
                 const TensorView& out);

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

// What a shape looks like in an error message: "[32, 10]".
struct ShapeText {
  char text[160];
  explicit ShapeText(const TensorView& view);
};

const char* dtype_name(DType dtype);

}  // namespace lipcore
