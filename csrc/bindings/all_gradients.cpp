// The hooks that serve batches of one from their gradients.
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_of_one/all_gradients.h"
#include "bindings/bind.h"
#include "bindings/views.h"
#include "distribution.h"

namespace lipcore {
namespace {

// places: (owner's dict, key, parameter, measured, read); links: (a module's dict, key, value), sizes: (it, length);
// calls as SingleBatchCalls has them.
std::shared_ptr<SingleBatch> make_single_batch(
    const std::vector<std::tuple<py::dict, py::str, py::object, bool, bool>>& places,
    const std::vector<std::tuple<py::dict, py::str, py::object>>& links,
    const std::vector<std::tuple<py::dict, Py_ssize_t>>& sizes, const std::vector<py::object>& calls,
    Py_ssize_t batch_dim, int passes) {
  std::vector<GradientReader::Place> list;
  for (const auto& [owner, key, parameter, measured, read] : places)
    list.push_back({owner.ptr(), key.ptr(), parameter.ptr(), measured, read});
  std::vector<GradientReader::Link> all_links;
  for (const auto& [owner, key, value] : links) all_links.push_back({owner.ptr(), key.ptr(), value.ptr()});
  for (const auto& [owner, size] : sizes) all_links.push_back({owner.ptr(), nullptr, nullptr, size});
  if (calls.size() != kSingleBatchCalls) throw py::value_error("calls: expected one object per member");
  SingleBatchCalls objects;
  for (size_t i = 0; i < calls.size(); ++i) reinterpret_cast<PyObject**>(&objects)[i] = calls[i].ptr();
  auto batch = std::make_shared<SingleBatch>();
  check(batch->start(list, all_links, objects, batch_dim, passes));
  return batch;
}

void set_single_batch_sink(SingleBatch& batch, std::vector<int64_t> index,
                           const std::vector<Distribution*>& distributions, double factor_sq) {
  if (distributions.size() < 2 || index.size() != batch.squares().size())
    throw py::value_error("index: expected a place per gradient that is read, and a distribution per place and one");
  for (const int64_t k : index)
    if (k < 0 || k + 1 >= static_cast<int64_t>(distributions.size()))
      throw py::value_error("index: expected places of distributions but the last one");
  batch.set_sink({std::move(index), distributions, factor_sq});
}

}  // namespace

void bind_single_batch(py::module_& m) {
  py::class_<SingleBatch, std::shared_ptr<SingleBatch>>(
      m, "SingleBatch", "Hooks of a model whose batches of one are read from gradients.")
      .def(py::init(&make_single_batch), py::arg("places"), py::arg("links"), py::arg("sizes"), py::arg("calls"),
           py::arg("batch_dim"), py::arg("passes"))
      .def(
          "before_forward",
          [](SingleBatch& batch, py::handle module, const py::tuple& arguments, const py::dict& keywords) {
            check(batch.before_forward(module.ptr(), arguments.ptr(), keywords.ptr()));
          },
          py::arg("module"), py::arg("arguments"), py::arg("keywords"))
      .def(
          "after_forward",
          [](SingleBatch& batch, py::handle, py::handle, py::handle output) {
            check(batch.after_forward(output.ptr()));
          },
          py::arg("module"), py::arg("arguments"), py::arg("output"))
      .def("set_sink", &set_single_batch_sink, py::arg("index"), py::arg("distributions"), py::arg("factor_sq"),
           py::keep_alive<1, 3>())
      .def("remove_sink", &SingleBatch::remove_sink)
      .def("take", &SingleBatch::take)
      .def_property_readonly("pending", &SingleBatch::pending)
      .def_property_readonly("total", &SingleBatch::total)
      .def_property_readonly("task", &SingleBatch::task)
      .def_property_readonly("squares", &SingleBatch::squares)
      .def("stop", &SingleBatch::stop)
      .def_readwrite("active", &SingleBatch::active);
  m.attr("SINGLE_ADDED") = static_cast<int>(SingleBatch::kAdded);
  m.attr("SINGLE_GRAPH") = static_cast<int>(SingleBatch::kGraph);
  m.attr("SINGLE_CALLS") = kSingleBatchCalls;
  m.attr("SINGLE_STOPPED") = static_cast<int>(SingleBatch::kStopped);
  m.attr("SINGLE_ELSEWHERE") = static_cast<int>(SingleBatch::kElsewhere);
  m.attr("GRADIENTS_NOTHING") = static_cast<int>(GradientReader::Found::kNothing);
  m.attr("GRADIENTS_EXPECTED") = static_cast<int>(GradientReader::Found::kExpected);
  m.attr("GRADIENTS_OTHERS") = static_cast<int>(GradientReader::Found::kOthers);
  m.attr("GRADIENTS_STRIDED") = static_cast<int>(GradientReader::Found::kStrided);
}

}  // namespace lipcore
