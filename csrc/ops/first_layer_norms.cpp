#include "ops/first_layer_norms.h"

#include <cmath>
#include <limits>

#include "ops/read_element.h"
#include "python/tensor_text.h"

namespace lipcore {
namespace {

// ||W^T delta|| of one sample, in float64; delta starts at `offset` of its view.
double pulled_back_norm(const TensorView& delta, int64_t offset, int64_t stride, const TensorView& weight) {
  double total = 0;
  for (int64_t i = 0; i < weight.shape[1]; ++i) {
    double dot = 0;
    for (int64_t o = 0; o < weight.shape[0]; ++o)
      dot += read_element(delta, offset + o * stride) *
             read_element(weight, o * weight.strides[0] + i * weight.strides[1]);
    total += dot * dot;
  }
  return std::sqrt(total);
}

bool check_weight(const TensorView& weight, int64_t outputs, const TensorView& delta) {
  if (weight.ndim == 2 && weight.shape[0] == outputs && weight.on_cpu() && delta.on_cpu()) return true;
  return fail({"weight"}, "expected shape [%lld, I] on the CPU for delta of shape %s, got %s",
              static_cast<long long>(outputs), ShapeText(delta).text, ShapeText(weight).text);
}

}  // namespace

bool sample_ratio(const TensorView& delta, const TensorView& output_grad, const TensorView& weight, double* r,
                  double* lambda) {
  if (output_grad.numel != 1 || !output_grad.on_cpu())
    return fail({"output_grad"}, "expected one value on the CPU, got shape %s", ShapeText(output_grad).text);
  if (delta.ndim != 1) return fail({"delta"}, "expected shape [O], got %s", ShapeText(delta).text);
  if (!check_weight(weight, delta.numel, delta)) return false;
  const double eps = std::abs(read_element(output_grad, 0));
  *r = *lambda = std::numeric_limits<double>::quiet_NaN();
  if (!(eps > 0 && std::isfinite(eps))) return true;
  double sum = 0;
  for (int64_t o = 0; o < delta.numel; ++o) {
    const double x = read_element(delta, o * delta.strides[0]);
    sum += x * x;
  }
  *r = std::sqrt(sum) / eps;
  *lambda = pulled_back_norm(delta, 0, delta.strides[0], weight) / eps;
  return true;
}

bool first_layer_norms(const TensorView& delta, const TensorView& weight, const TensorView& out) {
  if (delta.ndim != 2) return fail({"delta"}, "expected shape [B, O], got %s", ShapeText(delta).text);
  const int64_t rows = delta.shape[0], outputs = delta.shape[1];
  if (!check_weight(weight, outputs, delta)) return false;
  if (out.dtype != DType::kFloat64 || out.ndim != 2 || out.shape[0] != 3 || out.shape[1] != rows || !out.on_cpu() ||
      (rows > 1 && out.strides[1] != 1) || (rows && out.strides[0] != rows))
    return fail({"out"}, "expected a contiguous float64 tensor of shape [3, %lld], got %s",
                static_cast<long long>(rows), ShapeText(out).text);
  auto* norms = static_cast<double*>(out.data);
  for (int64_t b = 0; b < rows; ++b) {
    double sum = 0;
    for (int64_t o = 0; o < outputs; ++o) {
      const double x = read_element(delta, b * delta.strides[0] + o * delta.strides[1]);
      sum += x * x;
    }
    norms[b] = norms[2 * rows + b] = std::sqrt(sum);
    norms[rows + b] = pulled_back_norm(delta, b * delta.strides[0], delta.strides[1], weight);
  }
  return true;
}

}  // namespace lipcore
