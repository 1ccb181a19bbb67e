// Distributions, and what is put into several of them at once.
#include <cmath>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/views.h"
#include "distribution.h"
#include "ops/observe_rows.h"
#include "python/tensor_text.h"

namespace lipcore {
namespace {

void observe_values(Distribution& distribution, py::handle values) {
  const TensorView v = view_of(values, "values");
  if (v.dtype != DType::kFloat64 || v.ndim != 1 || !v.on_cpu())
    throw py::value_error("values: expected a 1-dimensional float64 CPU tensor, got " +
                          std::string(dtype_name(v.dtype)) + " " + ShapeText(v).text);
  const auto* x = static_cast<const double*>(v.data);
  for (int64_t i = 0; i < v.numel; ++i) distribution.observe(x[i * v.strides[0]]);
}

// numerators[k, b] / |output_grad[0, b]| into distribution k; NaN ("missing") where usable_ratio() says so.
void observe_ratios(py::handle numerators, py::handle output_grad, const std::vector<Distribution*>& distributions,
                    double smallest) {
  const TensorView n = view_of(numerators, "numerators"), g = view_of(output_grad, "output_grad");
  if (n.dtype != DType::kFloat64 || g.dtype != DType::kFloat64 || n.ndim != 2 || g.ndim != 2 || g.shape[0] != 1 ||
      !n.on_cpu() || !g.on_cpu() || n.shape[1] != g.shape[1] || n.shape[0] < static_cast<int64_t>(distributions.size()))
    throw py::value_error(
        "numerators: expected float64 [columns, B] beside output_grad float64 [1, B] on the CPU, got " +
        std::string(ShapeText(n).text) + " and " + ShapeText(g).text);
  const auto* x = static_cast<const double*>(n.data);
  const auto* gradient = static_cast<const double*>(g.data);
  for (int64_t b = 0; b < g.numel; ++b) {
    const double by = gradient[b * g.strides[1]];
    for (size_t k = 0; k < distributions.size(); ++k)
      distributions[k]->observe(
          usable_ratio(x[static_cast<int64_t>(k) * n.strides[0] + b * n.strides[1]], by, smallest));
  }
}

// The roots of squares[k, b] into distribution k.
void observe_roots(py::handle squares, const std::vector<Distribution*>& distributions) {
  const TensorView s = view_of(squares, "squares");
  if (s.dtype != DType::kFloat64 || s.ndim != 2 || !s.on_cpu() ||
      s.shape[0] != static_cast<int64_t>(distributions.size()))
    throw py::value_error("squares: expected float64 [len(distributions), B] on the CPU, got " +
                          std::string(dtype_name(s.dtype)) + " " + ShapeText(s).text);
  const auto* x = static_cast<const double*>(s.data);
  for (int64_t b = 0; b < s.shape[1]; ++b)
    for (size_t k = 0; k < distributions.size(); ++k)
      distributions[k]->observe(std::sqrt(x[static_cast<int64_t>(k) * s.strides[0] + b * s.strides[1]]));
}

// `what` is an Observable; gradient None but for ratios.
void observe_rows_of(py::handle values, int what, py::handle gradient, double smallest, py::handle rows,
                     py::handle bins) {
  TensorView by{};
  if (!gradient.is_none()) by = view_of(gradient, "gradient");
  check(observe_rows(view_of(values, "values"), enumerator_of<Observable>(what, "what", 3),
                     gradient.is_none() ? nullptr : &by, smallest, view_of(rows, "rows", Access::kWrite),
                     integers_of(bins, "bins")));
}

// out[k, b] = the sum over squares[p, b] with index[p] = k; out's last row the sum over all p, NaN unless they are
// known.
void place_sums(py::handle squares, const std::vector<int64_t>& index, bool known, py::handle out) {
  const TensorView s = view_of(squares, "squares"), sums = view_of(out, "out", Access::kWrite);
  for (const TensorView* table : {&s, &sums})
    if (table->dtype != DType::kFloat64 || table->ndim != 2 || !table->on_cpu())
      throw py::value_error("squares, out: expected float64 [rows, B] on the CPU, got " +
                            std::string(dtype_name(table->dtype)) + " " + ShapeText(*table).text);
  const int64_t samples = s.shape[1], last = sums.shape[0] - 1;
  if (s.shape[0] != static_cast<int64_t>(index.size()) || sums.shape[1] != samples || last < 0)
    throw py::value_error("squares: expected [len(index), B] beside out [places + 1, B], got " +
                          std::string(ShapeText(s).text) + " and " + ShapeText(sums).text);
  for (const int64_t k : index)
    if (k < 0 || k >= last) throw py::value_error("index: expected places of out but the last one");
  const auto* x = static_cast<const double*>(s.data);
  auto* y = static_cast<double*>(sums.data);
  const int64_t row = sums.strides[0], column = sums.strides[1];
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t k = 0; k <= last; ++k) y[k * row + b * column] = 0;
    double total = 0;
    for (size_t p = 0; p < index.size(); ++p) {
      const double value = x[static_cast<int64_t>(p) * s.strides[0] + b * s.strides[1]];
      y[index[p] * row + b * column] += value;
      total += value;
    }
    y[last * row + b * column] = known ? total : std::nan("");
  }
}

// out[i] = count, mean, min, max (NaN where nothing was observed), missing, invalid and the quantiles of distribution
// i.
void describe_distributions(const std::vector<const Distribution*>& distributions, const std::vector<double>& quantiles,
                            py::handle out) {
  const TensorView v = view_of(out, "out", Access::kWrite);
  const auto columns = static_cast<int64_t>(6 + quantiles.size());
  if (v.dtype != DType::kFloat64 || v.ndim != 2 || !v.on_cpu() ||
      v.shape[0] != static_cast<int64_t>(distributions.size()) || v.shape[1] != columns)
    throw py::value_error("out: expected float64 [len(distributions), 6 + len(quantiles)] on the CPU, got " +
                          std::string(dtype_name(v.dtype)) + " " + ShapeText(v).text);
  for (size_t i = 0; i < distributions.size(); ++i) {
    const Distribution& d = *distributions[i];
    const Moments& m = d.moments();
    const bool any = m.count > 0;
    const double nan = std::nan("");
    const double numbers[] = {m.count,
                              any ? m.mean : nan,
                              any ? m.min : nan,
                              any ? m.max : nan,
                              static_cast<double>(d.missing()),
                              static_cast<double>(d.invalid())};
    double* row = static_cast<double*>(v.data) + static_cast<int64_t>(i) * v.strides[0];
    for (int64_t k = 0; k < columns; ++k)
      row[k * v.strides[1]] = k < 6 ? numbers[k] : d.quantile(quantiles[static_cast<size_t>(k - 6)]);
  }
}

void reset_distributions(const std::vector<Distribution*>& distributions) {
  for (Distribution* d : distributions) d->reset();
}

}  // namespace

void bind_distribution(py::module_& m) {
  py::class_<Distribution>(m, "Distribution", "Moments and quantile histogram of a stream of values >= 0.")
      .def(py::init<>())
      .def("observe", &Distribution::observe, py::arg("value"))
      .def("observe_all", &observe_values, py::arg("values"))
      .def("merge", &Distribution::merge, py::arg("other"))
      .def("reset", &Distribution::reset)
      .def("quantile", &Distribution::quantile, py::arg("q"))
      .def_property_readonly("count", [](const Distribution& d) { return static_cast<int64_t>(d.moments().count); })
      .def_property_readonly("mean", [](const Distribution& d) { return d.moments().mean; })
      .def_property_readonly("m2", [](const Distribution& d) { return d.moments().m2; })
      .def_property_readonly("min", [](const Distribution& d) { return d.moments().min; })
      .def_property_readonly("max", [](const Distribution& d) { return d.moments().max; })
      .def_property_readonly("missing", &Distribution::missing)
      .def_property_readonly("invalid", &Distribution::invalid)
      .def("bins", &Distribution::bins)
      .def(
          "set_state",
          [](Distribution& d, double count, double mean, double m2, double min, double max, int64_t missing,
             int64_t invalid, const std::vector<int64_t>& bins) {
            if (!d.set_state({count, mean, m2, min, max}, missing, invalid, bins))
              throw py::value_error("bins: counts do not add up to the number of values, or a bin is out of range");
          },
          py::arg("count"), py::arg("mean"), py::arg("m2"), py::arg("min"), py::arg("max"), py::arg("missing"),
          py::arg("invalid"), py::arg("bins"));
  m.attr("BINS") = kBins;
  m.def("bin_middle", &bin_middle, py::arg("bin"));
  m.def("bin_of", &bin_of, py::arg("value"));
  m.def("describe_distributions", &describe_distributions, py::arg("distributions"), py::arg("quantiles"),
        py::arg("out"));
  m.def("reset_distributions", &reset_distributions, py::arg("distributions"));
  m.def("observe_ratios", &observe_ratios, py::arg("numerators"), py::arg("output_grad"), py::arg("distributions"),
        py::arg("smallest"));
  m.attr("OBSERVED_COLUMNS") = kObservedColumns;
  m.attr("OBSERVE_VALUES") = static_cast<int>(Observable::kValues);
  m.attr("OBSERVE_ROOTS") = static_cast<int>(Observable::kRoots);
  m.attr("OBSERVE_RATIOS") = static_cast<int>(Observable::kRatios);
  m.def("observe_rows", &observe_rows_of, py::arg("values"), py::arg("what"), py::arg("gradient"), py::arg("smallest"),
        py::arg("rows"), py::arg("bins"));
  m.def("observe_roots", &observe_roots, py::arg("squares"), py::arg("distributions"));
  m.def("place_sums", &place_sums, py::arg("squares"), py::arg("index"), py::arg("known"), py::arg("out"));
}

}  // namespace lipcore
