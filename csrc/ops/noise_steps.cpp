#include "ops/noise_steps.h"

#include <cmath>
#include <initializer_list>

#include "python/tensor_text.h"

namespace lipcore {
namespace {

bool is_table(const TensorView& table, std::initializer_list<int64_t> shape) {
  if (table.dtype != DType::kFloat64 || !table.on_cpu() || table.ndim != static_cast<int32_t>(shape.size()))
    return false;
  int64_t stride = table.numel;
  int32_t d = 0;
  for (const int64_t size : shape) {
    if (table.shape[d] != size) return false;
    stride = size ? stride / size : 0;
    if (table.numel && size > 1 && table.strides[d] != stride) return false;
    ++d;
  }
  return true;
}

}  // namespace

bool noise_steps(const std::vector<TensorView>& pending, double samples, double decay, const TensorView& ema,
                 const TensorView& out) {
  const int64_t count = static_cast<int64_t>(pending.size()), places = ema.ndim == 2 ? ema.shape[1] : 0;
  if (!is_table(ema, {4, places}))
    return fail({"ema"}, "expected float64 [4, places] on the CPU, got %s", ShapeText(ema).text);
  for (int64_t k = 0; k < count; ++k) {
    const TensorView& step = pending[static_cast<size_t>(k)];
    if (!is_table(step, {2, places}))
      return fail({"pending", k}, "expected float64 [2, %lld] on the CPU, got %s", static_cast<long long>(places),
                  ShapeText(step).text);
  }
  if (!is_table(out, {count, 3, places}))
    return fail({"out"}, "expected float64 [%lld, 3, %lld] on the CPU, got %s", static_cast<long long>(count),
                static_cast<long long>(places), ShapeText(out).text);
  auto* averages = static_cast<double*>(ema.data);
  for (int64_t k = 0; k < count; ++k) {
    const auto* mean = static_cast<const double*>(pending[static_cast<size_t>(k)].data);
    const double* batch = mean + places;
    double* step = static_cast<double*>(out.data) + 3 * places * k;
    for (int64_t p = 0; p < places; ++p) {
      // E|mean gradient|^2 = |G|^2 + tr(Sigma) / B, and the samples' spread is (B - 1) / B of tr(Sigma).
      const double excess = (mean[p] - batch[p]) / (samples - 1);
      const double signal = batch[p] - excess, noise = excess * samples;
      const bool usable = mean[p] >= 0 && batch[p] >= 0 && std::isfinite(signal) && std::isfinite(noise);
      step[p] = usable ? 1 : 0;
      step[places + p] = usable ? signal : 0;
      step[2 * places + p] = usable ? noise : 0;
      if (!usable) continue;
      for (int64_t row = 0; row < 3; ++row) {
        double& average = averages[row * places + p];
        average = average * decay + (1 - decay) * step[row * places + p];
      }
      averages[3 * places + p] += 1;
    }
  }
  return true;
}

}  // namespace lipcore
