// How parameters move: steps, their ledger, sketches, and the rules of optimizers.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/views.h"
#include "distribution.h"
#include "ops/fold_means.h"
#include "ops/sketch.h"
#include "ops/square_sums.h"
#include "ops/trajectory_step.h"
#include "ops/update_sums.h"
#include "python/tensor_text.h"
#include "trajectory/gradient_list.h"
#include "trajectory/ledger.h"
#include "trajectory/movement_check.h"
#include "trajectory/sketch_plan.h"
#include "trajectory/trajectory_plan.h"

namespace lipcore {
namespace {

void trajectory_step_of(py::handle params, py::handle prev, py::handle deviation, int64_t count, py::handle out) {
  check(trajectory_step(views_of(params, "params"), views_of(prev, "prev", Access::kWrite),
                        views_of(deviation, "deviation", Access::kWrite), count, view_of(out, "out", Access::kWrite)));
}

void sketch_of(py::handle tensors, const std::vector<int64_t>& first_index, uint64_t seed, py::handle out) {
  check(sketch(views_of(tensors, "tensors"), first_index, seed, view_of(out, "out", Access::kWrite)));
}

// A list or tuple of as many objects as there are parameters.
PyObject** objects_of(py::handle list, const char* name, const char* what, Py_ssize_t n) {
  if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr()))
    throw py::type_error(std::string(name) + ": expected a list or tuple of " + what + ", got " +
                         Py_TYPE(list.ptr())->tp_name);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(list.ptr());
  if (size != n) check(fail({name}, "expected %zd %s, one per parameter, got %zd", n, what, size));
  return PySequence_Fast_ITEMS(list.ptr());
}

// Whether a field of a rule is a number on a device, which nobody waits for.
bool is_on_device(PyObject* field, int64_t index, TensorView* view) {
  if (PyFloat_Check(field) || PyLong_Check(field)) return false;
  if (view_tensor(field, {"rules", index}, Access::kRead, view)) return view->numel == 1 && !view->on_cpu();
  PyErr_Clear();  // whatever else has a value as a float
  return false;
}

// The fields of lipcore.update_rules.UpdateRule, in its order.
void read_rule(PyObject* rule, int64_t index, UpdateItem* item) {
  double fields[8];
  const bool shaped = PyTuple_Check(rule) && PyTuple_GET_SIZE(rule) == 8;
  for (Py_ssize_t k = 0; shaped && k < 8; ++k) {
    PyObject* field = PyTuple_GET_ITEM(rule, k);
    TensorView there{};
    if (k < 6 && is_on_device(field, index, &there)) {
      item->scalar_at[k] = there;
      fields[k] = std::nan("");
      continue;
    }
    fields[k] = PyFloat_AsDouble(field);
    if (fields[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  if (!shaped) {
    PyErr_Format(PyExc_TypeError, "rules[%lld]: expected a lipcore.update_rules.UpdateRule, got %s",
                 static_cast<long long>(index), Py_TYPE(rule)->tp_name);
    throw py::error_already_set();
  }
  item->scalars = {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
  item->adaptive = fields[6] != 0;
  item->has_momentum = fields[7] != 0;
}

// None stands for a tensor that the rule has no use for.
bool view_or_none(PyObject* object, const char* name, int64_t index, bool needed, TensorView* view) {
  if (object == Py_None && !needed) return false;
  check(view_tensor(object, {name, index}, Access::kRead, view));
  return true;
}

// A list with an entry per parameter, or None for none of them.
PyObject** optional_objects(py::handle list, const char* name, Py_ssize_t n) {
  return list.is_none() ? nullptr : objects_of(list, name, "tensors", n);
}

std::vector<UpdateItem> update_items_of(py::handle params, py::handle first, py::handle second, py::handle rules,
                                        py::handle gradients, py::handle previous) {
  const std::vector<TensorView> views = views_of(params, "params");
  const auto n = static_cast<Py_ssize_t>(views.size());
  PyObject** firsts = objects_of(first, "first", "tensors", n);
  PyObject** seconds = objects_of(second, "second", "tensors", n);
  PyObject** given = objects_of(rules, "rules", "rules", n);
  PyObject** grads = optional_objects(gradients, "gradients", n);
  PyObject** before = optional_objects(previous, "previous", n);
  std::vector<UpdateItem> items(views.size());
  for (Py_ssize_t i = 0; i < n; ++i) {
    UpdateItem& item = items[i];
    item.w = views[i];
    read_rule(given[i], i, &item);
    item.has_second = view_or_none(seconds[i], "second", i, item.adaptive || item.scalars.mix != 0, &item.second);
    item.has_first = view_or_none(firsts[i], "first", i, item.has_second || item.scalars.rate != 0, &item.first);
    // Only what a rule can use: of a gradient, the ratio to the second moment.
    item.has_gradient = grads && item.adaptive && view_or_none(grads[i], "gradients", i, false, &item.gradient);
    item.has_previous = before && view_or_none(before[i], "previous", i, false, &item.previous);
  }
  return items;
}

void update_sums_of(py::handle params, py::handle first, py::handle second, py::handle rules, py::handle rows,
                    py::handle squares, py::handle gradients, py::handle previous) {
  const std::vector<UpdateItem> items = update_items_of(params, first, second, rules, gradients, previous);
  check(update_sums(items, view_of(rows, "rows", Access::kWrite), view_of(squares, "squares", Access::kWrite)));
}

std::unique_ptr<MovementCheck> make_movement_check(py::handle recent, std::vector<int64_t> places,
                                                   std::vector<double> units_sq) {
  auto made = std::make_unique<MovementCheck>();
  check(made->open(recent.ptr(), std::move(places), std::move(units_sq)));
  return made;
}

// The tensors themselves are held, not the lists, which their owner may change.
void take_movement(MovementCheck& into, py::handle params, py::handle first, py::handle second, py::handle rules,
                   py::handle previous) {
  into.drop();
  std::vector<UpdateItem> items = update_items_of(params, first, second, rules, py::none(), previous);
  std::vector<PyObject*> holders;
  for (const py::handle list : {params, first, second, previous})
    for (Py_ssize_t i = 0; !list.is_none() && i < PySequence_Fast_GET_SIZE(list.ptr()); ++i)
      holders.push_back(PySequence_Fast_GET_ITEM(list.ptr(), i));
  check(into.take(std::move(items), holders));
}

void observe_squares_of(py::handle squares, py::handle table) {
  check(observe_squares(view_of(squares, "squares"), view_of(table, "table", Access::kWrite)));
}

// share and gap_sq float64 [n]; see fold_means().
void fold_means_of(py::handle last, py::handle reference, py::handle deviation, py::handle earlier, py::handle share,
                   py::handle gap_sq) {
  const BlockMeans block{views_of(last, "last"), views_of(reference, "reference"), views_of(deviation, "deviation")};
  const auto earliers = views_of(earlier, "earlier", Access::kWrite);
  const TensorView s = view_of(share, "share", Access::kWrite), out = view_of(gap_sq, "gap_sq", Access::kWrite);
  for (const TensorView* vector : {&s, &out})
    if (vector->dtype != DType::kFloat64 || !vector->same_device(s) ||
        vector->numel != static_cast<int64_t>(earliers.size()))
      throw py::value_error("share, gap_sq: expected float64 tensors on one device with one number per tensor");
  for (const auto* list : {&block.last, &block.reference, &block.deviation})
    if (list->size() != earliers.size())
      throw py::value_error("last, reference, deviation, earlier: expected as many tensors of each");
  check(fold_means(block, earliers, static_cast<const double*>(s.data), static_cast<double*>(out.data), out.device));
}

void square_sums_of(py::handle tensors, py::handle out) {
  const auto views = views_of(tensors, "tensors");
  const TensorView table = view_of(out, "out", Access::kWrite);
  if (table.dtype != DType::kFloat64 || table.ndim != 2 || table.shape[0] != static_cast<int64_t>(views.size()) ||
      table.shape[1] != kStepSums)
    throw py::value_error("out: expected a float64 tensor with a row per tensor and " + std::to_string(kStepSums) +
                          " columns, got " + ShapeText(table).text);
  check(square_sums(views, static_cast<StepSums*>(table.data), table.device));
}

std::unique_ptr<Ledger> make_ledger(py::handle rows, py::handle recent, py::handle cursor, int64_t tensors) {
  auto ledger = std::make_unique<Ledger>();
  check(ledger->open(rows.ptr(), recent.ptr(), cursor.ptr(), tensors));
  return ledger;
}

std::unique_ptr<TrajectoryPlan> make_plan(const std::vector<py::tuple>& entries, Ledger& ledger) {
  auto plan = std::make_unique<TrajectoryPlan>();
  std::vector<ParameterEntry> list;
  std::vector<TrajectoryCopies> copies;
  for (const py::tuple& entry : entries) {
    if (entry.size() != 6 || !PyDict_Check(py::object(entry[0]).ptr()))
      throw py::type_error("entries: expected tuples (owner dict, key, name, prev, deviation, m2 or None)");
    auto own = [&](size_t i) { return py::object(entry[i]).release().ptr(); };
    list.push_back({own(0), own(1), entry[2].cast<std::string>()});
    copies.push_back({own(3), own(4), own(5)});
  }
  check(plan->capture(std::move(list), std::move(copies), &ledger));
  return plan;
}

std::unique_ptr<SketchPlan> make_sketch_plan(const std::vector<py::tuple>& entries, py::handle sketches,
                                             py::handle weights, uint64_t seed) {
  auto plan = std::make_unique<SketchPlan>();
  std::vector<ParameterEntry> list;
  std::vector<SketchPlace> places;
  for (const py::tuple& entry : entries) {
    if (entry.size() != 5 || !PyDict_Check(py::object(entry[0]).ptr()))
      throw py::type_error("entries: expected tuples (owner dict, key, name, first_index, row)");
    places.push_back({entry[3].cast<int64_t>(), entry[4].cast<int64_t>()});
  }
  for (const py::tuple& entry : entries)
    list.push_back(
        {py::object(entry[0]).release().ptr(), py::object(entry[1]).release().ptr(), entry[2].cast<std::string>()});
  check(plan->capture(std::move(list), std::move(places), sketches.ptr(), weights.ptr(), seed));
  return plan;
}

// Update norm and update/weight ratio of steps [begin, end) of a ring on the CPU, row by row into distributions 2i and
// 2i + 1. What was left out is NaN, "missing" there.
void observe_recent(py::handle recent, int64_t begin, int64_t end, const std::vector<Distribution*>& distributions) {
  const TensorView view = view_of(recent, "recent");
  if (view.dtype != DType::kFloat64 || view.ndim != 3 || !view.on_cpu() || view.shape[2] != 2 ||
      static_cast<size_t>(view.shape[1]) * 2 != distributions.size() || begin < 0 || end - begin > view.shape[0])
    throw py::value_error("recent: expected a float64 CPU tensor [ring, rows, 2] and two distributions per row, got " +
                          std::string(ShapeText(view).text));
  const auto* steps = static_cast<const RecentStep*>(view.data);
  for (int64_t row = 0; row < view.shape[1]; ++row) {
    Distribution &updates = *distributions[2 * row], &ratios = *distributions[2 * row + 1];
    for (int64_t t = begin; t < end; ++t) {
      const RecentStep& step = steps[t % view.shape[0] * view.shape[1] + row];
      updates.observe(std::sqrt(step.dw_sq));
      ratios.observe(update_ratio(std::sqrt(step.dw_sq), std::sqrt(step.weight_sq)));
    }
  }
}

// out[2 row] and out[2 row + 1] = quantiles of the update norms and of the ratios of steps [begin, end): what
// observe_recent() and the distributions would say, of a window that is short enough to lie in the ring.
void recent_quantiles(py::handle recent, int64_t begin, int64_t end, const std::vector<double>& q, py::handle out) {
  const TensorView view = view_of(recent, "recent"), found = view_of(out, "out", Access::kWrite);
  if (view.dtype != DType::kFloat64 || view.ndim != 3 || !view.on_cpu() || view.shape[2] != 2 || begin < 0 ||
      end < begin || end - begin > view.shape[0])
    throw py::value_error("recent: expected a float64 CPU tensor [ring, rows, 2] with steps begin to end in it, got " +
                          std::string(ShapeText(view).text));
  if (found.dtype != DType::kFloat64 || found.ndim != 2 || !found.on_cpu() || found.shape[0] != 2 * view.shape[1] ||
      found.shape[1] != static_cast<int64_t>(q.size()))
    throw py::value_error("out: expected float64 [2 * rows, len(quantiles)] on the CPU, got " +
                          std::string(ShapeText(found).text));
  const auto* steps = static_cast<const RecentStep*>(view.data);
  auto* y = static_cast<double*>(found.data);
  const int64_t count = end - begin;
  std::vector<double> updates(static_cast<size_t>(count)), ratios(static_cast<size_t>(count));
  std::vector<int> bins(static_cast<size_t>(count));
  for (int64_t row = 0; row < view.shape[1]; ++row) {
    for (int64_t t = 0; t < count; ++t) {
      const RecentStep& step = steps[(begin + t) % view.shape[0] * view.shape[1] + row];
      const double update = std::sqrt(step.dw_sq);
      updates[static_cast<size_t>(t)] = update;
      ratios[static_cast<size_t>(t)] = update_ratio(update, std::sqrt(step.weight_sq));
    }
    const auto quantiles = static_cast<int64_t>(q.size());
    double* to = y + 2 * row * found.strides[0];
    Distribution::quantiles(updates.data(), count, q.data(), quantiles, bins.data(), to, found.strides[1]);
    to += found.strides[0];
    Distribution::quantiles(ratios.data(), count, q.data(), quantiles, bins.data(), to, found.strides[1]);
  }
}

// Steps [begin, end) of a ring on the CPU, row by row side by side: first[t, j] and second[t, j] are the roots of what
// the last rows of it hold, one row per column.
void step_norms(py::handle recent, int64_t begin, int64_t end, py::handle first, py::handle second) {
  const TensorView ring = view_of(recent, "recent"), one = view_of(first, "first", Access::kWrite);
  if (ring.dtype != DType::kFloat64 || ring.ndim != 3 || !ring.on_cpu() || ring.shape[2] != 2 || begin < 0 ||
      end < begin || end - begin > ring.shape[0])
    throw py::value_error("recent: expected a float64 CPU tensor [ring, rows, 2] with steps " + std::to_string(begin) +
                          " to " + std::to_string(end) + ", got " + ShapeText(ring).text);
  const TensorView other = second.is_none() ? one : view_of(second, "second", Access::kWrite);
  for (const TensorView* out : {&one, &other})
    if (out->dtype != DType::kFloat64 || out->ndim != 2 || !out->on_cpu() || out->shape[0] != end - begin ||
        out->shape[1] > ring.shape[1] || out->shape[1] != one.shape[1])
      throw py::value_error("first, second: expected float64 CPU tensors [" + std::to_string(end - begin) +
                            ", at most " + std::to_string(ring.shape[1]) + "], got " + ShapeText(*out).text);
  const auto* steps = static_cast<const RecentStep*>(ring.data);
  auto* squares = static_cast<double*>(one.data);
  auto* weights = second.is_none() ? nullptr : static_cast<double*>(other.data);
  const int64_t rows = ring.shape[1], columns = one.shape[1], left_out = rows - columns, length = ring.shape[0];
  // The caller's references keep the three tensors, and a ring is never resized. A step that another thread makes
  // meanwhile is written behind `end`, so that it meets these only after a whole round of the ring.
  py::gil_scoped_release release;
  for (int64_t t = begin; t < end; ++t) {
    const RecentStep* row = steps + t % length * rows + left_out;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = (t - begin) * columns + j;
      squares[at] = std::sqrt(row[j].dw_sq);
      if (weights) weights[at] = std::sqrt(row[j].weight_sq);
    }
  }
}

// Steps [begin, end) of a ring on the CPU of numerators and denominators, [ring, tensors, 2]: out[t, j] is the root of
// the quotient of tensor j, then of the sums over each group, then over all. What is not finite is in no sum; NaN where
// nothing is.
void step_quotients(py::handle recent, int64_t begin, int64_t end, py::handle group_of, int64_t groups,
                    py::handle out) {
  const TensorView ring = view_of(recent, "recent"), found = view_of(out, "out", Access::kWrite);
  const TensorView group = integers_of(group_of, "group_of");
  if (ring.dtype != DType::kFloat64 || ring.ndim != 3 || !ring.on_cpu() || ring.shape[2] != 2 || !ring.is_dense() ||
      begin < 0 || end < begin || end - begin > ring.shape[0] || group.numel != ring.shape[1] || !group.on_cpu())
    throw py::value_error("recent: expected a float64 CPU tensor [ring, tensors, 2] with steps " +
                          std::to_string(begin) + " to " + std::to_string(end) +
                          " and as many numbers of groups, got " + ShapeText(ring).text);
  const int64_t tensors = ring.shape[1], columns = tensors + groups + 1;
  if (found.dtype != DType::kFloat64 || found.ndim != 2 || !found.on_cpu() || found.shape[0] != end - begin ||
      found.shape[1] != columns || groups < 0)
    throw py::value_error("out: expected a float64 CPU tensor [" + std::to_string(end - begin) + ", " +
                          std::to_string(columns) + "], got " + ShapeText(found).text);
  const auto* places = static_cast<const int64_t*>(group.data);
  for (int64_t j = 0; j < tensors; ++j)
    if (places[j] < 0 || places[j] >= groups) check(fail({"group_of", j}, "is not one of the groups"));
  struct Pair {
    double above, below;
  };
  std::vector<Pair> sums(static_cast<size_t>(groups) + 1);
  for (int64_t t = begin; t < end; ++t) {
    const auto* pairs = static_cast<const Pair*>(ring.data) + t % ring.shape[0] * tensors;
    double* row = static_cast<double*>(found.data) + (t - begin) * columns;
    std::fill(sums.begin(), sums.end(), Pair{0, 0});
    for (int64_t j = 0; j < tensors; ++j) {
      const bool finite = std::isfinite(pairs[j].above) && std::isfinite(pairs[j].below);
      row[j] = finite ? std::sqrt(pairs[j].above / pairs[j].below) : std::nan("");
      for (Pair* sum : {&sums[static_cast<size_t>(places[j])], &sums.back()})
        if (finite) sum->above += pairs[j].above, sum->below += pairs[j].below;
    }
    for (size_t g = 0; g < sums.size(); ++g)
      row[tensors + static_cast<int64_t>(g)] = std::sqrt(sums[g].above / sums[g].below);
  }
}

std::unique_ptr<GradientList> make_gradient_list(const std::vector<std::tuple<py::dict, py::str, py::object>>& given) {
  std::vector<GradientEntry> entries;
  for (const auto& [owner, key, shadow] : given) {
    for (PyObject* object : {owner.ptr(), key.ptr()}) Py_INCREF(object);
    PyObject* parameter = shadow.is_none() ? nullptr : shadow.ptr();
    Py_XINCREF(parameter);
    entries.push_back({owner.ptr(), key.ptr(), parameter});
  }
  auto list = std::make_unique<GradientList>();
  list->capture(std::move(entries));
  return list;
}

bool read_gradients(GradientList& list, py::handle out) {
  const auto found = list.read(view_of(out, "out", Access::kWrite));
  check(found != GradientList::Found::kError);
  return found == GradientList::Found::kPlain;
}

}  // namespace

void bind_trajectory(py::module_& m) {
  m.def("trajectory_step", &trajectory_step_of, py::arg("params"), py::arg("prev"), py::arg("deviation"),
        py::arg("count"), py::arg("out"));
  m.def("sketch", &sketch_of, py::arg("tensors"), py::arg("first_index"), py::arg("seed"), py::arg("out"));
  m.def("update_sums", &update_sums_of, py::arg("params"), py::arg("first"), py::arg("second"), py::arg("rules"),
        py::arg("rows"), py::arg("squares"), py::arg("gradients") = py::none(), py::arg("previous") = py::none());
  m.def("observe_squares", &observe_squares_of, py::arg("squares"), py::arg("table"));
  m.def("fold_means", &fold_means_of, py::arg("last"), py::arg("reference"), py::arg("deviation"), py::arg("earlier"),
        py::arg("share"), py::arg("gap_sq"));
  m.def("square_sums", &square_sums_of, py::arg("tensors"), py::arg("out"));
  py::class_<Ledger>(m, "Ledger", "Scalars of a trajectory: tensors, groups and the total.")
      .def(py::init(&make_ledger), py::arg("rows"), py::arg("recent"), py::arg("cursor"), py::arg("tensors"))
      .def(
          "observe", [](Ledger& ledger, py::handle sums) { check(ledger.observe_tensor(sums.ptr())); },
          py::arg("sums"));
  py::class_<MovementCheck>(m, "MovementCheck", "What optimizers did in a step, for a plan to compare with.")
      .def(py::init(&make_movement_check), py::arg("recent"), py::arg("places"), py::arg("units_sq"))
      .def("take", &take_movement, py::arg("params"), py::arg("first"), py::arg("second"), py::arg("rules"),
           py::arg("previous"))
      .def("drop", &MovementCheck::drop);
  py::class_<TrajectoryPlan>(m, "TrajectoryPlan", "Parameters, their copies and the ledger of their movement.")
      .def(py::init(&make_plan), py::arg("entries"), py::arg("ledger"), py::keep_alive<1, 3>())
      .def("step", [](TrajectoryPlan& plan) { return check(plan.step()), plan.block == kTrajectoryBlock; })
      .def(
          "step_with",
          [](TrajectoryPlan& plan, MovementCheck& movement) {
            return check(plan.step(&movement)), plan.block == kTrajectoryBlock;
          },
          py::arg("check"))
      .def_readwrite("block", &TrajectoryPlan::block)
      .def_readonly("captured", &TrajectoryPlan::captured);
  py::class_<SketchPlan>(m, "SketchPlan", "Parameters and the tensors that their sketches and weights are written to.")
      .def(py::init(&make_sketch_plan), py::arg("entries"), py::arg("sketches"), py::arg("weights"), py::arg("seed"))
      .def("step", [](SketchPlan& plan) { check(plan.step()); });
  m.def("observe_recent", &observe_recent, py::arg("recent"), py::arg("begin"), py::arg("end"),
        py::arg("distributions"));
  m.def("recent_quantiles", &recent_quantiles, py::arg("recent"), py::arg("begin"), py::arg("end"),
        py::arg("quantiles"), py::arg("out"));
  m.def("step_norms", &step_norms, py::arg("recent"), py::arg("begin"), py::arg("end"), py::arg("first"),
        py::arg("second"));
  m.def("step_quotients", &step_quotients, py::arg("recent"), py::arg("begin"), py::arg("end"), py::arg("group_of"),
        py::arg("groups"), py::arg("out"));
  py::class_<GradientList>(m, "GradientList", "Parameters whose gradients are read.")
      .def(py::init(&make_gradient_list), py::arg("entries"))
      .def("read", &read_gradients, py::arg("out"));
  m.attr("CONTINUES") = kContinues;
  m.attr("BLOCK_STEPS") = kTrajectoryBlock;
  m.attr("STEP_COLUMNS") = kStepSums;
  m.attr("UPDATE_SQUARES") = static_cast<int>(kUpdateSquares);
  m.attr("LEDGER_COLUMNS") = kTrajectoryColumns;
}

}  // namespace lipcore
