#include "ops/outer_norms.h"

#include <algorithm>

#include "kernels.h"
#include "ops/sample_norms.h"
#include "python/parallel.h"
#include "python/tensor_text.h"

namespace lipcore {
namespace {

bool check_rows(const TensorView& t, ArgumentName name, int64_t samples, Rows* rows) {
  if (!t.on_cpu()) return fail(name, "is on another device than x[0]; put all on one");
  if (t.ndim < 1) return fail(name, "expected shape [B, ...] with one row per sample, got a 0-dimensional tensor");
  if (t.shape[0] != samples)
    return fail(name, "expected %lld samples in the first dimension, as x[0] has, got shape %s",
                static_cast<long long>(samples), ShapeText(t).text);
  if (!describe_rows(t, rows))
    return fail(name, "has more than 8 dimensions that cannot be merged; pass a contiguous tensor");
  return true;
}

struct Layer {
  Rows x, grad;
};

struct Task {
  int64_t layer, begin, end;
};

bool in_range(double sum) { return sum >= 1e-280 && sum <= 1e300; }

double square(double a) { return a * a; }

}  // namespace

bool outer_norms(const std::vector<TensorView>& x, const std::vector<TensorView>& grad, const TensorView& out) {
  if (x.size() != grad.size())
    return fail({"grad"}, "expected %zu tensors, one per tensor of x, got %zu", x.size(), grad.size());
  const auto count = static_cast<int64_t>(x.size());
  const int64_t samples = count && x[0].ndim ? x[0].shape[0] : 0;
  if (out.dtype != DType::kFloat64 || out.ndim != 3 || !out.on_cpu() || out.numel != out.shape[0] * count * samples ||
      out.shape[0] < 1 || out.shape[0] > 2 || out.shape[1] != count || (out.numel && out.strides[2] != 1))
    return fail({"out"}, "expected float64 [1 or 2, %lld, %lld], got %s", static_cast<long long>(count),
                static_cast<long long>(samples), ShapeText(out).text);
  static thread_local std::vector<Layer> layer_memory;
  static thread_local std::vector<Task> task_memory;
  auto& layers = layer_memory;  // the threads of the pool must see this thread's
  auto& tasks = task_memory;
  layers.resize(x.size());
  tasks.clear();
  int64_t total = 0;
  for (int64_t l = 0; l < count; ++l) {
    Layer& layer = layers[l];
    if (!check_rows(x[l], {"x", l}, samples, &layer.x) || !check_rows(grad[l], {"grad", l}, samples, &layer.grad))
      return false;
    const int64_t length = layer.x.length + layer.grad.length;
    const int64_t per_task = std::max<int64_t>(1, kChunk / 2 / std::max<int64_t>(1, length));
    for (int64_t b = 0; b < samples; b += per_task) tasks.push_back({l, b, std::min(samples, b + per_task)});
    total += samples * length;
  }
  auto* weight = static_cast<double*>(out.data);
  double* bias = out.shape[0] == 2 ? weight + count * samples : nullptr;
  const auto run = [&](int64_t i) {
    const Task& task = tasks[i];
    const Layer& layer = layers[task.layer];
    for (int64_t b = task.begin; b < task.end; ++b) {
      const double xx = sum_squares_of_row(layer.x, b), gg = sum_squares_of_row(layer.grad, b);
      const int64_t at = task.layer * samples + b;
      const bool safe = in_range(xx) && in_range(gg);
      weight[at] = safe ? xx * gg : square(norm_of_row(layer.x, b, xx) * norm_of_row(layer.grad, b, gg));
      if (bias) bias[at] = gg;
    }
  };
  const bool parallel = total >= kSerialElements;
  PyThreadState* state = parallel ? PyEval_SaveThread() : nullptr;
  parallel_for(static_cast<int64_t>(tasks.size()), parallel, run);
  if (state) PyEval_RestoreThread(state);
  return true;
}

}  // namespace lipcore
