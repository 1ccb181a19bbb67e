#include "ops/embedding_norms.h"

#include <algorithm>

#include "kernels.h"
#include "ops/devices.h"
#include "ops/offsets.h"
#include "ops/token_groups.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

bool on_device(const TensorView& tokens, const TensorView& order, const TensorView& grad, const TensorView* weights,
               const int64_t* padding, Offsets offsets, const TensorView& out) {
#if defined(LIPCORE_WITH_CUDA)
  const cuda::EmbeddingNorms norms{static_cast<const int64_t*>(tokens.data),
                                   static_cast<const int64_t*>(order.data),
                                   grad.data,
                                   grad.dtype,
                                   {grad.strides[0], grad.strides[1], grad.strides[2]},
                                   weights ? static_cast<const double*>(weights->data) : nullptr,
                                   padding,
                                   offsets.begin ? offsets.samples : grad.shape[0],
                                   grad.shape[1],
                                   grad.shape[2],
                                   offsets.begin};
  return cuda::embedding_norms(norms, grad.device, static_cast<double*>(out.data));
#else
  (void)tokens, (void)order, (void)grad, (void)weights, (void)padding, (void)offsets, (void)out;
  return refuse_device("grad");
#endif
}

}  // namespace

bool embedding_norms(const TensorView& ids, const TensorView* order, const TensorView& grad, const TensorView* weights,
                     const int64_t* padding, Offsets offsets, const TensorView& out) {
  // The strides of an empty tensor mean nothing.
  if (grad.ndim != 3 || (grad.on_cpu() && grad.numel && grad.shape[2] > 1 && grad.strides[2] != 1))
    return fail({"grad"}, "expected [B, T, D], with flat rows on the CPU, got %s", ShapeText(grad).text);
  if ((order != nullptr) == grad.on_cpu()) return fail({"order"}, "expected the rows' order on a CUDA device alone");
  if (order) return on_device(ids, *order, grad, weights, padding, offsets, out);
  const int64_t length = grad.shape[1], width = grad.shape[2];
  const int64_t samples = offsets.begin ? offsets.samples : grad.shape[0];
  static thread_local TokenGroups group_memory;
  static thread_local std::vector<GroupBlock> block_memory;
  static thread_local std::vector<double> partial_memory;
  auto& groups = group_memory;  // the threads of the pool must see this thread's
  auto& blocks = block_memory;
  auto& partials = partial_memory;
  const auto* w = weights ? static_cast<const double*>(weights->data) : nullptr;
  const auto run = [&](int64_t i) {
    static thread_local std::vector<double> sums;
    sums.resize(static_cast<size_t>(width));
    const GroupBlock& block = blocks[i];
    double total = 0;
    for (int64_t k = block.begin; k < block.end; ++k) {
      const int64_t first = groups.first(block.sample, k), last = groups.last(block.sample, k);
      const auto start = [&](int64_t at) {
        const int64_t row = groups.rows[at];
        const int64_t t = offsets.begin ? row : row - block.sample * length;
        const int64_t sample = offsets.begin ? 0 : block.sample;
        return static_cast<const char*>(grad.data) +
               (sample * grad.strides[0] + t * grad.strides[1]) * item_size(grad.dtype);
      };
      const auto& squares = *kernels().sample_norms;
      if (last == first + 1 && !w) {
        total += squares.sum_squares(start(first), grad.dtype, width);
        continue;
      }
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t at = first; at < last; ++at)
        kernels().token_sums->add_row(start(at), grad.dtype, width, w ? w[groups.rows[at]] : 1, sums.data());
      total += squares.sum_squares(sums.data(), DType::kFloat64, width);
    }
    partials[i] = total;
  };
  const bool parallel = grad.numel >= kSerialElements;
  PyThreadState* state = parallel ? PyEval_SaveThread() : nullptr;
  groups.make(static_cast<const int64_t*>(ids.data), padding, offsets, samples, length);
  cut_groups(groups, &blocks);
  partials.resize(blocks.size());
  parallel_for(static_cast<int64_t>(blocks.size()), parallel, run);
  if (state) PyEval_RestoreThread(state);
  auto* norms = static_cast<double*>(out.data);
  std::fill(norms, norms + out.numel, 0.0);
  for (size_t i = 0; i < blocks.size(); ++i) norms[blocks[i].sample] += partials[i];
  return true;
}

}  // namespace lipcore
