// Norms of per-sample gradients, one function per kind of layer.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/views.h"
#include "math/weight_cost.h"
#include "ops/conv_norms.h"
#include "ops/embedding_norms.h"
#include "ops/first_layer_norms.h"
#include "ops/linear_norms.h"
#include "ops/noise_steps.h"
#include "ops/offsets.h"
#include "ops/row_sum_norms.h"
#include "ops/tied_cross.h"
#include "python/tensor_text.h"

namespace lipcore {
namespace {

// A float64 result of `count` elements on the device of `like`, as lipcore.functional makes it.
TensorView result_of(py::handle out, int64_t count, const TensorView& like) {
  const TensorView view = view_of(out, "out", Access::kWrite);
  if (view.dtype != DType::kFloat64 || !view.same_device(like) || view.numel != count)
    throw py::value_error("out: expected " + std::to_string(count) + " float64 numbers on the device of the input, " +
                          "got " + ShapeText(view).text);
  return view;
}

int64_t count_samples(py::handle offsets, const TensorView& grad, Offsets* packed) {
  if (!offsets.is_none()) {
    check(read_offsets(integers_of(offsets, "offsets"), grad, grad.ndim == 3 ? grad.shape[1] : 0, packed));
    return packed->samples;
  }
  return grad.ndim ? grad.shape[0] : 0;
}

// `count` numbers on the device of `like`.
const TensorView& counted(const TensorView& view, const char* name, int64_t count, const TensorView& like) {
  if (view.numel != count || !view.same_device(like))
    throw py::value_error(std::string(name) + ": expected " + std::to_string(count) +
                          " numbers on the device of the gradient, got " + ShapeText(view).text);
  return view;
}

// One row of x and grad per token: [N, ...] beside offsets, which are None where there is a dimension of samples.
Offsets packed_of(py::handle offsets, const TensorView& x) {
  Offsets packed;
  if (!offsets.is_none()) check(read_offsets(integers_of(offsets, "offsets"), x, x.ndim ? x.shape[0] : 0, &packed));
  return packed;
}

void conv_norms_sq_of(py::handle x, py::handle grad, const std::vector<int64_t>& kernel_size,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups, bool gram, py::handle out) {
  check(conv_norms_sq(view_of(x, "x"), view_of(grad, "grad"), {kernel_size, stride, padding, dilation, groups}, gram,
                      view_of(out, "out", Access::kWrite)));
}

void linear_norms_of(py::handle x, py::handle grad, py::handle offsets, int method, py::handle out) {
  const TensorView inputs = view_of(x, "x");
  check(linear_norms(inputs, view_of(grad, "grad"), packed_of(offsets, inputs),
                     enumerator_of<LinearMethod>(method, "method", kLinearMethods), view_of(out, "out", Access::kWrite),
                     nullptr));
}

void linear_weight_grad_of(py::handle x, py::handle grad, py::handle offsets, py::handle total, py::handle out) {
  const TensorView inputs = view_of(x, "x"), weight_grad = view_of(total, "total", Access::kWrite);
  check(linear_norms(inputs, view_of(grad, "grad"), packed_of(offsets, inputs), LinearMethod::kChoose,
                     view_of(out, "out", Access::kWrite), &weight_grad));
}

void row_sum_norms_of(py::handle grad, py::handle x, py::handle offsets, int terms, py::handle out,
                      std::optional<double> eps, bool center) {
  const TensorView g = view_of(grad, "grad");
  TensorView other;
  if (!x.is_none()) other = view_of(x, "x");
  const Terms wanted = enumerator_of<Terms>(terms, "terms", kTerms);
  const bool fits = x.is_none() ? wanted == Terms::kShift
                                : other.ndim == 3 && g.ndim == 3 && std::equal(g.shape, g.shape + 3, other.shape);
  if (!fits) throw py::value_error("x: expected the shape of grad, got " + std::string(ShapeText(g).text));
  Offsets packed;
  const int64_t samples = count_samples(offsets, g, &packed);
  const Normalizer normalizer{eps.value_or(0), center};
  if (eps && (!(*eps >= 0) || x.is_none())) throw py::value_error("eps: expected a number >= 0, and an x");
  check(row_sum_norms(g, x.is_none() ? nullptr : &other, packed, wanted,
                      result_of(out, wanted == Terms::kBoth ? 2 * samples : samples, g), eps ? &normalizer : nullptr));
}

void embedding_norms_of(py::handle ids, py::handle order, py::handle grad, py::handle weights,
                        std::optional<int64_t> padding, py::handle offsets, py::handle out) {
  const TensorView g = view_of(grad, "grad");
  Offsets packed;
  const int64_t samples = count_samples(offsets, g, &packed), rows = g.ndim == 3 ? g.shape[0] * g.shape[1] : 0;
  TensorView w;
  if (!weights.is_none()) {
    w = counted(view_of(weights, "weights", Access::kWrite), "weights", rows, g);
    if (w.dtype != DType::kFloat64)
      throw py::value_error(std::string("weights: expected float64, got ") + dtype_name(w.dtype));
  }
  TensorView sorted;
  if (!order.is_none()) sorted = counted(integers_of(order, "order"), "order", rows, g);
  check(embedding_norms(counted(integers_of(ids, "indices"), "indices", rows, g), order.is_none() ? nullptr : &sorted,
                        g, weights.is_none() ? nullptr : &w, padding ? &*padding : nullptr, packed,
                        result_of(out, samples, g)));
}

void tied_cross_of(py::handle ids, py::handle grad_embedding, py::handle x, py::handle grad_head,
                   std::optional<int64_t> padding, py::handle out) {
  const TensorView i = integers_of(ids, "indices");
  const TensorView e = view_of(grad_embedding, "grad_embedding");
  counted(i, "indices", i.numel, e);
  check(tied_cross(i, e, view_of(x, "x"), view_of(grad_head, "grad_head"), padding ? &*padding : nullptr,
                   result_of(out, i.ndim ? i.shape[0] : 0, i)));
}

// Sizes along one to three dimensions.
bool conv_uses_gram(const std::vector<int64_t>& size, const std::vector<int64_t>& out,
                    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& padding, int64_t inputs,
                    int64_t outputs, bool on_cpu) {
  ConvShape shape{1, inputs, outputs, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  if (size.empty() || size.size() > 3 || out.size() != size.size() || kernel_size.size() != size.size() ||
      padding.size() != size.size())
    throw py::value_error("size: expected one to three numbers, as many as in out, kernel_size and padding");
  for (size_t d = 0; d < size.size(); ++d) {
    shape.size[d] = size[d];
    shape.out[d] = out[d];
    shape.kernel[d] = kernel_size[d];
    shape.padding[d] = padding[d];
  }
  return gram_is_cheaper(shape, on_cpu);
}

void first_layer_norms_of(py::handle delta, py::handle weight, py::handle out) {
  check(first_layer_norms(view_of(delta, "delta"), view_of(weight, "weight"), view_of(out, "out", Access::kWrite)));
}

void noise_steps_of(py::handle pending, int64_t samples, double decay, py::handle ema, py::handle out) {
  if (samples < 2) throw py::value_error("samples: expected 2 or more, got " + std::to_string(samples));
  check(noise_steps(views_of(pending, "pending"), static_cast<double>(samples), decay,
                    view_of(ema, "ema", Access::kWrite), view_of(out, "out", Access::kWrite)));
}

}  // namespace

void bind_per_sample(py::module_& m) {
  m.def("conv_norms_sq", &conv_norms_sq_of, py::arg("x"), py::arg("grad"), py::arg("kernel_size"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("gram"), py::arg("out"));
  m.def("linear_norms", &linear_norms_of, py::arg("x"), py::arg("grad"), py::arg("offsets"), py::arg("method"),
        py::arg("out"));
  m.def("linear_weight_grad", &linear_weight_grad_of, py::arg("x"), py::arg("grad"), py::arg("offsets"),
        py::arg("total"), py::arg("out"));
  m.def(
      "linear_uses_gram",
      [](int64_t t, int64_t i, int64_t o, bool on_cpu) {
        return linear_method(t, i, o, on_cpu) == LinearMethod::kGram;
      },
      py::arg("tokens"), py::arg("inputs"), py::arg("outputs"), py::arg("on_cpu"));
  m.def("linear_suits_torch", &torch_is_cheaper, py::arg("samples"), py::arg("tokens"), py::arg("inputs"),
        py::arg("outputs"), py::arg("tensor_cores"));
  m.def("linear_suits_one_pass", &one_pass_is_cheaper, py::arg("inputs"), py::arg("outputs"));
  m.def("linear_gram_lengths", &gram_lengths, py::arg("inputs"), py::arg("outputs"), py::arg("on_cpu"));
  m.def("linear_suits_pairs", &pairs_are_cheaper, py::arg("rows"), py::arg("samples"), py::arg("inputs"),
        py::arg("outputs"));
  m.def("conv_uses_gram", &conv_uses_gram, py::arg("size"), py::arg("out"), py::arg("kernel_size"), py::arg("padding"),
        py::arg("inputs"), py::arg("outputs"), py::arg("on_cpu"));
  m.def("row_sum_norms", &row_sum_norms_of, py::arg("grad"), py::arg("x"), py::arg("offsets"), py::arg("terms"),
        py::arg("out"), py::arg("eps") = py::none(), py::arg("center") = true);
  m.def("embedding_norms", &embedding_norms_of, py::arg("indices"), py::arg("order"), py::arg("grad"),
        py::arg("weights"), py::arg("padding"), py::arg("offsets"), py::arg("out"));
  m.def("tied_cross", &tied_cross_of, py::arg("indices"), py::arg("grad_embedding"), py::arg("x"), py::arg("grad_head"),
        py::arg("padding"), py::arg("out"));
  m.def("noise_steps", &noise_steps_of, py::arg("pending"), py::arg("samples"), py::arg("decay"), py::arg("ema"),
        py::arg("out"));
  m.def("first_layer_norms", &first_layer_norms_of, py::arg("delta"), py::arg("weight"), py::arg("out"));
}

}  // namespace lipcore
