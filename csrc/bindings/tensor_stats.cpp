// Statistics of tensors' elements.
#include <vector>

#include "bindings/bind.h"
#include "bindings/views.h"
#include "ops/tensor_stats.h"

namespace lipcore {
namespace {

void tensor_stats_of(py::handle tensors, const std::vector<int64_t>& places, py::handle rows, py::handle bins) {
  check(tensor_stats(views_of(tensors, "tensors"), places, view_of(rows, "rows", Access::kWrite),
                     integers_of(bins, "bins")));
}

void merge_tensor_stats_of(py::handle other_rows, py::handle other_bins, const std::vector<int64_t>& places,
                           py::handle rows, py::handle bins, bool gone) {
  check(merge_tensor_stats(view_of(other_rows, "other_rows", gone ? Access::kWrite : Access::kRead),
                           integers_of(other_bins, "other_bins"), places, view_of(rows, "rows", Access::kWrite),
                           integers_of(bins, "bins"), gone));
}

}  // namespace

void bind_tensor_stats(py::module_& m) {
  m.attr("TENSOR_STATS") = kTensorStats;
  m.attr("TENSOR_BINS") = kTensorBins;
  m.def("merge_tensor_stats", &merge_tensor_stats_of, py::arg("other_rows"), py::arg("other_bins"), py::arg("places"),
        py::arg("rows"), py::arg("bins"), py::arg("gone"));
  m.def("tensor_bin_low", &tensor_bin_low, py::arg("bin"));
  m.def("tensor_stats", &tensor_stats_of, py::arg("tensors"), py::arg("places"), py::arg("rows"), py::arg("bins"));
}

}  // namespace lipcore
