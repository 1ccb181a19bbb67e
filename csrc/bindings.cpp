// The only file that sees pybind11: view, check, call. The module loads without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>

#include "distribution.h"
#include "ledger.h"
#include "ops/conv_norms.h"
#include "ops/linear_norms.h"
#include "ops/ops.h"
#include "ops/per_sample.h"
#include "ops/sketch.h"
#include "ops/update_sums.h"
#include "parallel.h"
#include "single_batch.h"
#include "single_sample.h"
#include "sketch_plan.h"
#include "tensor_view.h"
#include "trajectory_plan.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace lipcore {
namespace {

void check(bool fine) {
  if (!fine) throw py::error_already_set();
}

TensorView view_of(py::handle object, const char* name, Access access = Access::kRead, int64_t index = -1) {
  TensorView view;
  check(view_tensor(object.ptr(), {name, index}, access, &view));
  return view;
}

// A list or tuple of tensors; anything else is a TypeError that says what it was.
std::vector<TensorView> views_of(py::handle list, const char* name, Access access = Access::kRead) {
  if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr()))
    throw py::type_error(std::string(name) + ": expected a list or tuple of tensors, got " +
                         Py_TYPE(list.ptr())->tp_name);
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(list.ptr());
  std::vector<TensorView> views;
  views.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) views.push_back(view_of(PySequence_Fast_GET_ITEM(list.ptr(), i), name, access, i));
  return views;
}

// Hot ops are plain C functions: pybind11's dispatcher would cost as much as the kernel.
PyObject* py_sample_norms(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "sample_norms(x, out): expected 2 arguments, got %zd", count);
  TensorView x, out;
  if (!view_tensor(arguments[0], {"x"}, Access::kRead, &x) ||
      !view_tensor(arguments[1], {"out"}, Access::kWrite, &out) || !sample_norms(x, out))
    return nullptr;
  Py_RETURN_NONE;
}

PyObject* py_normalized_norms(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3)
    return PyErr_Format(PyExc_TypeError, "normalized_norms(delta, output_grad, r): expected 3 arguments, got %zd",
                        count);
  TensorView delta, output_grad, r;
  int64_t skipped = 0;
  if (!view_tensor(arguments[0], {"delta"}, Access::kRead, &delta) ||
      !view_tensor(arguments[1], {"output_grad"}, Access::kRead, &output_grad) ||
      !view_tensor(arguments[2], {"r"}, Access::kWrite, &r) || !normalized_norms(delta, output_grad, r, &skipped))
    return nullptr;
  return PyLong_FromLongLong(skipped);
}

// name is only built on the slow path, so it comes as a Python string.
PyObject* py_check_storage(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const char* name = count >= 2 ? PyUnicode_AsUTF8(arguments[1]) : nullptr;
  if (!name) return PyErr_Format(PyExc_TypeError, "check_storage(tensor, name[, index]): expected a tensor and a name");
  const long long index = count > 2 ? PyLong_AsLongLong(arguments[2]) : -1;
  if (index == -1 && PyErr_Occurred()) return nullptr;
  const int negative = check_storage(arguments[0], {name, index});
  if (negative < 0) return nullptr;
  return PyBool_FromLong(negative);
}

// The sign of elements does not matter to a norm, so a negative bit is no obstacle.
bool view_list(PyObject* list, const char* name, std::vector<TensorView>* views) {
  if (!PyList_Check(list) && !PyTuple_Check(list)) {
    PyErr_Format(PyExc_TypeError, "%s: expected a list or tuple of tensors, got %s", name, Py_TYPE(list)->tp_name);
    return false;
  }
  views->resize(static_cast<size_t>(PySequence_Fast_GET_SIZE(list)));
  for (size_t i = 0; i < views->size(); ++i) {
    const ArgumentName argument = {name, static_cast<int64_t>(i)};
    PyObject* tensor = PySequence_Fast_GET_ITEM(list, static_cast<Py_ssize_t>(i));
    if (check_storage(tensor, argument) < 0 || !view_tensor(tensor, argument, Access::kRead, &(*views)[i]))
      return false;
  }
  return true;
}

PyObject* py_outer_norms(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3)
    return PyErr_Format(PyExc_TypeError, "outer_norms(x, grad, out): expected 3 arguments, got %zd", count);
  static thread_local std::vector<TensorView> x, grad;
  TensorView out;
  if (!view_list(arguments[0], "x", &x) || !view_list(arguments[1], "grad", &grad) ||
      !view_tensor(arguments[2], {"out"}, Access::kWrite, &out) || !outer_norms(x, grad, out))
    return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef kHotMethods[] = {
    {"outer_norms", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_outer_norms)), METH_FASTCALL,
     "outer_norms(x, grad, out, /)\n--\n\nout[0, l, b] = ||x_l[b]||^2 ||grad_l[b]||^2, out[1, l, b] = "
     "||grad_l[b]||^2."},
    {"sample_norms", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_sample_norms)), METH_FASTCALL,
     "sample_norms(x, out, /)\n--\n\nout[b] = ||x[b]||_2; x [B, ...], out float64 [B]."},
    {"normalized_norms", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_normalized_norms)),
     METH_FASTCALL,
     "normalized_norms(delta, output_grad, r, /)\n--\n\nr[b] = ||delta[b]||_2 / |output_grad[b]|; returns how many "
     "were skipped."},
    {"check_storage", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_check_storage)), METH_FASTCALL,
     "check_storage(tensor, name, index=-1, /)\n--\n\nTrue if the negative bit is set; ValueError if the storage is "
     "too small."},
    {nullptr, nullptr, 0, nullptr}};

void trajectory_step_of(py::handle params, py::handle prev, py::handle ref, py::handle mean, int64_t count,
                        py::handle out) {
  check(trajectory_step(views_of(params, "params"), views_of(prev, "prev", Access::kWrite), views_of(ref, "ref"),
                        views_of(mean, "mean", Access::kWrite), count, view_of(out, "out", Access::kWrite)));
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

// The fields of lipcore.update_rules.UpdateRule, in its order.
void read_rule(PyObject* rule, int64_t index, UpdateItem* item) {
  double fields[7];
  const bool shaped = PyTuple_Check(rule) && PyTuple_GET_SIZE(rule) == 7;
  for (Py_ssize_t k = 0; shaped && k < 7; ++k) {
    fields[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(rule, k));
    if (fields[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  if (!shaped) {
    PyErr_Format(PyExc_TypeError, "rules[%lld]: expected a lipcore.update_rules.UpdateRule, got %s",
                 static_cast<long long>(index), Py_TYPE(rule)->tp_name);
    throw py::error_already_set();
  }
  item->scalars = {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
  item->adaptive = fields[6] != 0;
}

// None stands for a tensor that the rule has no use for.
bool view_or_none(PyObject* object, const char* name, int64_t index, bool needed, TensorView* view) {
  if (object == Py_None && !needed) return false;
  check(view_tensor(object, {name, index}, Access::kRead, view));
  return true;
}

void sketch_of(py::handle tensors, const std::vector<int64_t>& first_index, uint64_t seed, py::handle out) {
  check(sketch(views_of(tensors, "tensors"), first_index, seed, view_of(out, "out", Access::kWrite)));
}

void conv_norms_sq_of(py::handle x, py::handle grad, const std::vector<int64_t>& kernel_size,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups, bool gram, py::handle out) {
  check(conv_norms_sq(view_of(x, "x"), view_of(grad, "grad"), {kernel_size, stride, padding, dilation, groups}, gram,
                      view_of(out, "out", Access::kWrite)));
}

void update_sums_of(py::handle params, py::handle first, py::handle second, py::handle rules, py::handle rows,
                    py::handle normalized) {
  const std::vector<TensorView> views = views_of(params, "params");
  const auto n = static_cast<Py_ssize_t>(views.size());
  PyObject** firsts = objects_of(first, "first", "tensors", n);
  PyObject** seconds = objects_of(second, "second", "tensors", n);
  PyObject** given = objects_of(rules, "rules", "rules", n);
  std::vector<UpdateItem> items(views.size());
  for (Py_ssize_t i = 0; i < n; ++i) {
    UpdateItem& item = items[i];
    item.w = views[i];
    read_rule(given[i], i, &item);
    item.has_second = view_or_none(seconds[i], "second", i, item.adaptive || item.scalars.mix != 0, &item.second);
    item.has_first = view_or_none(firsts[i], "first", i, item.has_second || item.scalars.rate != 0, &item.first);
  }
  check(update_sums(items, view_of(rows, "rows", Access::kWrite), view_of(normalized, "normalized", Access::kWrite)));
}

thread_local int paused = 0;  // > 0: forward passes of this thread are not recorded

// The two hooks of the batch-1 shortcut, as torch calls them. Neither raises: errors go to on_error(exception).
struct SingleSampleHooks : std::enable_shared_from_this<SingleSampleHooks> {
  SingleSampleHooks(py::handle first, py::handle last, std::vector<py::object> distributions, py::object grad_enabled,
                    py::object on_change, py::object on_check, py::object on_error)
      : shortcut(first.ptr(), last.ptr()),
        distributions(std::move(distributions)),
        grad_enabled(std::move(grad_enabled)),
        on_change(std::move(on_change)),
        on_check(std::move(on_check)),
        on_error(std::move(on_error)) {
    if (this->distributions.size() != cores.size())
      throw py::value_error("distributions: expected those of r, lambda and r where there is a lambda");
    for (size_t i = 0; i < cores.size(); ++i) cores[i] = this->distributions[i].cast<Distribution*>();
  }

  void before_forward(py::handle, const py::tuple& arguments) {
    if (paused || grad_enabled().ptr() != Py_True) return;
    const auto now = shortcut.begin(arguments.empty() ? nullptr : PyTuple_GET_ITEM(arguments.ptr(), 0));
    if (now == SingleSampleShortcut::kError) {
      report();
    } else if (now != serving) {
      serving = now;
      on_change(static_cast<int>(now));
    }
  }

  void after_backward() {
    double r, lambda;
    const auto way = shortcut.finish(&r, &lambda);
    if (way == SingleSampleShortcut::kServed) {
      cores[0]->observe(r);
      cores[1]->observe(lambda);
      cores[2]->observe(r);
    } else if (way == SingleSampleShortcut::kChecked) {
      if (on_check(r, lambda).ptr() != Py_True) shortcut.distrust();
    } else if (way == SingleSampleShortcut::kError) {
      report();
    }
  }

  void report() {
    py::error_already_set error;  // takes the exception that is set
    on_error(error.value());
  }

  template <typename Visit>
  void for_each_object(Visit visit) {
    for (py::object& object : distributions) visit(object);
    for (py::object* object : {&grad_enabled, &on_change, &on_check, &on_error}) visit(*object);
  }

  SingleSampleShortcut shortcut;
  std::vector<py::object> distributions;
  py::object grad_enabled, on_change, on_check, on_error;
  std::array<Distribution*, 3> cores{};
  SingleSampleShortcut::Way serving = SingleSampleShortcut::kError;  // unknown
};

// What the first bias calls: a plain C function, since pybind11's dispatcher costs a microsecond when its code is cold.
// The collector does not see a tensor's hooks, so that one must not keep anything alive.
PyObject* after_backward_hook(const std::weak_ptr<SingleSampleHooks>& hooks) {
  static PyMethodDef definition = {
      "after_backward",
      [](PyObject* self, PyObject*) -> PyObject* {
        auto* weak = static_cast<std::weak_ptr<SingleSampleHooks>*>(PyCapsule_GetPointer(self, nullptr));
        try {
          if (const auto alive = weak->lock()) alive->after_backward();
        } catch (py::error_already_set& error) {
          error.restore();
          return nullptr;
        }
        Py_RETURN_NONE;
      },
      METH_O, nullptr};
  const py::capsule self(new std::weak_ptr<SingleSampleHooks>(hooks),
                         [](void* weak) { delete static_cast<std::weak_ptr<SingleSampleHooks>*>(weak); });
  return PyCFunction_New(&definition, self.ptr());
}

// Model, hooks and this object refer to each other in a circle, which only Python's garbage collector can undo.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    auto& hooks = py::cast<SingleSampleHooks&>(py::handle(self));
    int stop = hooks.shortcut.traverse(visit, arg);
    hooks.for_each_object([&](py::object& object) {
      if (!stop && object) stop = visit(object.ptr(), arg);
    });
    return stop;
  };
  type->tp_clear = [](PyObject* self) {
    if (!py::detail::is_holder_constructed(self)) return 0;
    auto& hooks = py::cast<SingleSampleHooks&>(py::handle(self));
    hooks.shortcut.clear();
    hooks.for_each_object([](py::object& object) { object = py::none(); });
    return 0;
  };
}

// numerators[k, b] / |output_grad[0, b]| into distribution k; NaN ("missing") where output_grad is 0 or not finite.
void observe_ratios(py::handle numerators, py::handle output_grad, const std::vector<Distribution*>& distributions) {
  const TensorView n = view_of(numerators, "numerators"), g = view_of(output_grad, "output_grad");
  if (n.dtype != DType::kFloat64 || g.dtype != DType::kFloat64 || n.ndim != 2 || g.ndim != 2 || g.shape[0] != 1 ||
      !n.on_cpu() || !g.on_cpu() || n.shape[1] != g.shape[1] || n.shape[0] < static_cast<int64_t>(distributions.size()))
    throw py::value_error(
        "numerators: expected float64 [columns, B] beside output_grad float64 [1, B] on the CPU, got " +
        std::string(ShapeText(n).text) + " and " + ShapeText(g).text);
  const auto* x = static_cast<const double*>(n.data);
  const auto* gradient = static_cast<const double*>(g.data);
  for (int64_t b = 0; b < g.numel; ++b) {
    const double eps = std::abs(gradient[b * g.strides[1]]);
    const bool usable = eps > 0 && std::isfinite(eps);
    for (size_t k = 0; k < distributions.size(); ++k)
      distributions[k]->observe(usable ? x[static_cast<int64_t>(k) * n.strides[0] + b * n.strides[1]] / eps
                                       : std::nan(""));
  }
}

void first_layer_norms_of(py::handle delta, py::handle weight, py::handle out) {
  check(first_layer_norms(view_of(delta, "delta"), view_of(weight, "weight"), view_of(out, "out", Access::kWrite)));
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

// places: (owner's dict, key, parameter, measured, read); calls as SingleBatchCalls has them.
std::shared_ptr<SingleBatch> make_single_batch(
    const std::vector<std::tuple<py::dict, py::str, py::object, bool, bool>>& places,
    const std::vector<py::object>& calls, Py_ssize_t batch_dim, int passes) {
  std::vector<GradientReader::Place> list;
  for (const auto& [owner, key, parameter, measured, read] : places)
    list.push_back({owner.ptr(), key.ptr(), parameter.ptr(), measured, read});
  if (calls.size() != kSingleBatchCalls) throw py::value_error("calls: expected one object per member");
  SingleBatchCalls objects;
  for (size_t i = 0; i < calls.size(); ++i) reinterpret_cast<PyObject**>(&objects)[i] = calls[i].ptr();
  auto batch = std::make_shared<SingleBatch>();
  check(batch->start(list, objects, batch_dim, passes));
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

void observe_values(Distribution& distribution, py::handle values) {
  const TensorView v = view_of(values, "values");
  if (v.dtype != DType::kFloat64 || v.ndim != 1 || !v.on_cpu())
    throw py::value_error("values: expected a 1-dimensional float64 CPU tensor, got " +
                          std::string(dtype_name(v.dtype)) + " " + ShapeText(v).text);
  const auto* x = static_cast<const double*>(v.data);
  for (int64_t i = 0; i < v.numel; ++i) distribution.observe(x[i * v.strides[0]]);
}

// share and gap_sq float64 [n]; see fold_means().
void fold_means_of(py::handle mean, py::handle earlier, py::handle share, py::handle gap_sq) {
  const auto means = views_of(mean, "mean"), earliers = views_of(earlier, "earlier", Access::kWrite);
  const TensorView s = view_of(share, "share", Access::kWrite), out = view_of(gap_sq, "gap_sq", Access::kWrite);
  for (const TensorView* vector : {&s, &out})
    if (vector->dtype != DType::kFloat64 || !vector->on_cpu() || vector->numel != static_cast<int64_t>(means.size()))
      throw py::value_error("share, gap_sq: expected float64 CPU tensors with one number per tensor");
  if (means.size() != earliers.size()) throw py::value_error("earlier: expected one tensor per mean");
  check(fold_means(means, earliers, static_cast<const double*>(s.data), static_cast<double*>(out.data)));
}

void square_sums_of(py::handle tensors, py::handle out) {
  const auto views = views_of(tensors, "tensors");
  const TensorView table = view_of(out, "out", Access::kWrite);
  if (table.dtype != DType::kFloat64 || table.ndim != 2 || table.shape[0] != static_cast<int64_t>(views.size()) ||
      table.shape[1] != kStepSums || !table.on_cpu())
    throw py::value_error("out: expected a float64 CPU tensor with a row per tensor and " + std::to_string(kStepSums) +
                          " columns, got " + ShapeText(table).text);
  check(square_sums(views, static_cast<StepSums*>(table.data)));
}

void linear_norms_of(py::handle x, py::handle grad, const std::vector<int64_t>& offsets, int method, py::handle out) {
  check(linear_norms(view_of(x, "x"), view_of(grad, "grad"), offsets, static_cast<LinearMethod>(method),
                     view_of(out, "out", Access::kWrite), nullptr));
}

void linear_weight_grad_of(py::handle x, py::handle grad, const std::vector<int64_t>& offsets, py::handle total,
                           py::handle out) {
  const TensorView weight_grad = view_of(total, "total", Access::kWrite);
  check(linear_norms(view_of(x, "x"), view_of(grad, "grad"), offsets, LinearMethod::kChoose,
                     view_of(out, "out", Access::kWrite), &weight_grad));
}

// A float64 result of `count` elements, as lipcore.functional makes it.
TensorView result_of(py::handle out, int64_t count) {
  const TensorView view = view_of(out, "out", Access::kWrite);
  if (view.dtype != DType::kFloat64 || !view.on_cpu() || view.numel != count)
    throw py::value_error("out: expected " + std::to_string(count) + " float64 numbers on the CPU, got " +
                          ShapeText(view).text);
  return view;
}

int64_t count_samples(py::handle offsets, const TensorView& grad, Offsets* packed) {
  if (!offsets.is_none()) {
    check(read_offsets(view_of(offsets, "offsets"), grad.ndim == 3 ? grad.shape[1] : 0, packed));
    return packed->samples;
  }
  return grad.ndim ? grad.shape[0] : 0;
}

void term_sums_of(py::handle grad, py::handle x, py::handle offsets, int terms, py::handle out) {
  const TensorView g = view_of(grad, "grad");
  TensorView other;
  if (!x.is_none()) other = view_of(x, "x");
  const bool fits = x.is_none() ? terms == 0
                                : other.ndim == 3 && g.ndim == 3 && terms >= 0 && terms <= 2 &&
                                      std::equal(g.shape, g.shape + 3, other.shape);
  if (!fits) throw py::value_error("x: expected the shape of grad, got " + std::string(ShapeText(g).text));
  Offsets packed;
  const int64_t samples = count_samples(offsets, g, &packed);
  check(term_sums(g, x.is_none() ? nullptr : &other, packed, static_cast<Terms>(terms),
                  result_of(out, terms == 2 ? 2 * samples : samples)));
}

// int64 tensors come as the float64 view of their bits: see Offsets.
TensorView flat_of(py::handle tensor, const char* name, int64_t count) {
  const TensorView view = view_of(tensor, name, Access::kWrite);
  if (view.dtype != DType::kFloat64 || view.numel != count || !view.on_cpu())
    throw py::value_error(std::string(name) + ": expected " + std::to_string(count) + " numbers, got " +
                          ShapeText(view).text);
  return view;
}

void embedding_norms_of(py::handle ids, py::handle grad, py::handle weights, std::optional<int64_t> padding,
                        py::handle offsets, py::handle out) {
  const TensorView g = view_of(grad, "grad");
  Offsets packed;
  const int64_t samples = count_samples(offsets, g, &packed), rows = g.ndim == 3 ? g.shape[0] * g.shape[1] : 0;
  TensorView w;
  if (!weights.is_none()) w = flat_of(weights, "weights", rows);
  check(embedding_norms(flat_of(ids, "indices", rows), g, weights.is_none() ? nullptr : &w,
                        padding ? &*padding : nullptr, packed, result_of(out, samples)));
}

void tied_cross_of(py::handle ids, py::handle grad_embedding, py::handle x, py::handle grad_head,
                   std::optional<int64_t> padding, py::handle out) {
  TensorView i = view_of(ids, "indices", Access::kWrite);
  i = flat_of(ids, "indices", i.numel);
  check(tied_cross(i, view_of(grad_embedding, "grad_embedding"), view_of(x, "x"), view_of(grad_head, "grad_head"),
                   padding ? &*padding : nullptr, result_of(out, i.ndim ? i.shape[0] : 0)));
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
    if (entry.size() != 7 || !PyDict_Check(py::object(entry[0]).ptr()))
      throw py::type_error("entries: expected tuples (owner dict, key, name, prev, ref, mean, m2 or None)");
    auto own = [&](size_t i) { return py::object(entry[i]).release().ptr(); };
    list.push_back({own(0), own(1), entry[2].cast<std::string>()});
    copies.push_back({own(3), own(4), own(5), own(6)});
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

// Large state is read once per step from end to end: huge pages save most of the page walks.
void advise_huge_pages(py::handle tensor) {
  const TensorView view = view_of(tensor, "tensor", Access::kWrite);
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(view.data) + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      reinterpret_cast<uintptr_t>(view.data) + static_cast<uintptr_t>(view.numel * item_size(view.dtype));
  if (view.on_cpu() && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

void register_types(py::handle tensor, py::handle parameter, py::handle refuse, py::handle accepts) {
  check(register_torch(tensor.ptr(), parameter.ptr(), refuse.ptr(), accepts.ptr()));
}

void use_isa(const std::string& name) {
  if (const char* message = select_isa(name.c_str())) throw py::value_error(message);
}

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
}

}  // namespace
}  // namespace lipcore

PYBIND11_MODULE(_core, m) {
  using namespace lipcore;
  m.doc() = "Compiled core of lipcore.";
  if (const char* message = select_isa_from_environment()) throw py::import_error(message);
  if (PyModule_AddFunctions(m.ptr(), kHotMethods) != 0) throw py::error_already_set();
  m.def("register_torch", &register_types, py::arg("tensor"), py::arg("parameter"), py::arg("refuse"),
        py::arg("accepts"));
  m.def("use_torch_threads", [](const std::string& path) { return use_torch_threads(path.c_str()); }, py::arg("path"));
  m.def("pool_size", &pool_size);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("float16_to_float", &float16_to_float, py::arg("bits"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("tensor"));
  m.def("trajectory_step", &trajectory_step_of, py::arg("params"), py::arg("prev"), py::arg("ref"), py::arg("mean"),
        py::arg("count"), py::arg("out"));
  m.def("sketch", &sketch_of, py::arg("tensors"), py::arg("first_index"), py::arg("seed"), py::arg("out"));
  m.def("conv_norms_sq", &conv_norms_sq_of, py::arg("x"), py::arg("grad"), py::arg("kernel_size"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("gram"), py::arg("out"));
  m.def("update_sums", &update_sums_of, py::arg("params"), py::arg("first"), py::arg("second"), py::arg("rules"),
        py::arg("rows"), py::arg("normalized"));
  m.def("linear_norms", &linear_norms_of, py::arg("x"), py::arg("grad"), py::arg("offsets"), py::arg("method"),
        py::arg("out"));
  m.def("linear_weight_grad", &linear_weight_grad_of, py::arg("x"), py::arg("grad"), py::arg("offsets"),
        py::arg("total"), py::arg("out"));
  m.def(
      "linear_uses_gram", [](int64_t t, int64_t i, int64_t o) { return linear_method(t, i, o) == LinearMethod::kGram; },
      py::arg("tokens"), py::arg("inputs"), py::arg("outputs"));
  m.def("term_sums", &term_sums_of, py::arg("grad"), py::arg("x"), py::arg("offsets"), py::arg("terms"),
        py::arg("out"));
  m.def("embedding_norms", &embedding_norms_of, py::arg("indices"), py::arg("grad"), py::arg("weights"),
        py::arg("padding"), py::arg("offsets"), py::arg("out"));
  m.def("tied_cross", &tied_cross_of, py::arg("indices"), py::arg("grad_embedding"), py::arg("x"), py::arg("grad_head"),
        py::arg("padding"), py::arg("out"));
  bind_distribution(m);
  py::class_<SingleSampleHooks, std::shared_ptr<SingleSampleHooks>>(
      m, "SingleSampleHooks", py::custom_type_setup(&make_collectable),
      "r and lambda of single samples from two bias gradients.")
      .def(py::init<py::handle, py::handle, std::vector<py::object>, py::object, py::object, py::object, py::object>(),
           py::arg("first"), py::arg("last"), py::arg("distributions"), py::arg("grad_enabled"), py::arg("on_change"),
           py::arg("on_check"), py::arg("on_error"))
      .def("before_forward", &SingleSampleHooks::before_forward, py::arg("module"), py::arg("arguments"))
      .def_property_readonly("after_backward",
                             [](SingleSampleHooks& hooks) {
                               return py::reinterpret_steal<py::object>(after_backward_hook(hooks.weak_from_this()));
                             })
      .def_property_readonly("served", [](const SingleSampleHooks& hooks) { return hooks.shortcut.served; })
      .def_property_readonly("abandoned", [](const SingleSampleHooks& hooks) { return hooks.shortcut.abandoned; })
      .def_property(
          "own_hooks", [](const SingleSampleHooks& hooks) { return hooks.shortcut.own_hooks; },
          [](SingleSampleHooks& hooks, Py_ssize_t count) { hooks.shortcut.own_hooks = count; });
  m.def("pause", [](int by) { paused += by; }, py::arg("by"));
  m.def("paused", [] { return paused > 0; });
  m.attr("SERVED") = static_cast<int>(SingleSampleShortcut::kServed);
  m.attr("CHECKED") = static_cast<int>(SingleSampleShortcut::kChecked);
  m.def("place_sums", &place_sums, py::arg("squares"), py::arg("index"), py::arg("known"), py::arg("out"));
  m.def("observe_roots", &observe_roots, py::arg("squares"), py::arg("distributions"));
  py::class_<SingleBatch, std::shared_ptr<SingleBatch>>(
      m, "SingleBatch", "Hooks of a model whose batches of one are read from gradients.")
      .def(py::init(&make_single_batch), py::arg("places"), py::arg("calls"), py::arg("batch_dim"), py::arg("passes"))
      .def(
          "before_forward",
          [](SingleBatch& batch, py::handle module, const py::tuple& arguments, const py::dict& keywords) {
            check(batch.before_forward(module.ptr(), arguments.ptr(), keywords.ptr(), paused > 0));
          },
          py::arg("module"), py::arg("arguments"), py::arg("keywords"))
      .def(
          "after_forward",
          [](SingleBatch& batch, py::handle, py::handle, py::handle output) {
            check(batch.after_forward(output.ptr(), paused > 0));
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
  m.attr("SINGLE_ELSEWHERE") = static_cast<int>(SingleBatch::kElsewhere);
  m.attr("GRADIENTS_NOTHING") = static_cast<int>(GradientReader::Found::kNothing);
  m.attr("GRADIENTS_EXPECTED") = static_cast<int>(GradientReader::Found::kExpected);
  m.attr("GRADIENTS_OTHERS") = static_cast<int>(GradientReader::Found::kOthers);
  m.attr("GRADIENTS_STRIDED") = static_cast<int>(GradientReader::Found::kStrided);
  m.def("observe_ratios", &observe_ratios, py::arg("numerators"), py::arg("output_grad"), py::arg("distributions"));
  m.def("first_layer_norms", &first_layer_norms_of, py::arg("delta"), py::arg("weight"), py::arg("out"));
  py::class_<Ledger>(m, "Ledger", "Scalars of a trajectory: tensors, groups and the total.")
      .def(py::init(&make_ledger), py::arg("rows"), py::arg("recent"), py::arg("cursor"), py::arg("tensors"))
      .def(
          "observe", [](Ledger& ledger, py::handle sums) { check(ledger.observe_tensor(sums.ptr())); },
          py::arg("sums"));
  m.def("fold_means", &fold_means_of, py::arg("mean"), py::arg("earlier"), py::arg("share"), py::arg("gap_sq"));
  m.def("square_sums", &square_sums_of, py::arg("tensors"), py::arg("out"));
  m.def("observe_recent", &observe_recent, py::arg("recent"), py::arg("begin"), py::arg("end"),
        py::arg("distributions"));
  py::class_<TrajectoryPlan>(m, "TrajectoryPlan", "Parameters, their copies and the ledger of their movement.")
      .def(py::init(&make_plan), py::arg("entries"), py::arg("ledger"), py::keep_alive<1, 3>())
      .def("step",
           [](TrajectoryPlan& plan) {
             check(plan.step());
             return plan.block == kTrajectoryBlock;
           })
      .def_readwrite("block", &TrajectoryPlan::block);
  py::class_<SketchPlan>(m, "SketchPlan", "Parameters and the tensors that their sketches and weights are written to.")
      .def(py::init(&make_sketch_plan), py::arg("entries"), py::arg("sketches"), py::arg("weights"), py::arg("seed"))
      .def("step", [](SketchPlan& plan) { check(plan.step()); });
  m.attr("CONTINUES") = kContinues;
  m.attr("BLOCK_STEPS") = kTrajectoryBlock;
  m.attr("STEP_COLUMNS") = kStepSums;
  m.attr("LEDGER_COLUMNS") = kTrajectoryColumns;
#if defined(LIPCORE_WITH_CUDA)
  m.attr("cuda_built") = true;
  m.def("cuda_device_count", &cuda::device_count);
#else
  m.attr("cuda_built") = false;
  m.def("cuda_device_count", [] { return 0; });
#endif
}
