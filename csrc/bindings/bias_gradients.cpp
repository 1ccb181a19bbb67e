// The hooks of the batch-1 shortcut.
#include <array>
#include <memory>
#include <vector>

#include "batch_of_one/bias_gradients.h"
#include "bindings/bind.h"
#include "bindings/views.h"
#include "distribution.h"
#include "python/training_pass.h"

namespace lipcore {
namespace {

// The two hooks of the batch-1 shortcut, as torch calls them. Neither raises: errors go to on_error(exception).
struct SingleSampleHooks : std::enable_shared_from_this<SingleSampleHooks> {
  SingleSampleHooks(py::handle first, py::handle last, std::vector<py::object> distributions, py::object on_change,
                    py::object on_check, py::object on_error)
      : shortcut(first.ptr(), last.ptr()),
        distributions(std::move(distributions)),
        on_change(std::move(on_change)),
        on_check(std::move(on_check)),
        on_error(std::move(on_error)) {
    if (this->distributions.size() != cores.size())
      throw py::value_error("distributions: expected those of r, lambda and r where there is a lambda");
    for (size_t i = 0; i < cores.size(); ++i) cores[i] = this->distributions[i].cast<Distribution*>();
  }

  void before_forward(py::handle, const py::tuple& arguments) {
    const int training = is_training_forward();
    if (training < 0) report();
    if (training != 1) return;
    const auto now = shortcut.begin(arguments.empty() ? nullptr : PyTuple_GET_ITEM(arguments.ptr(), 0));
    if (now == SingleSampleShortcut::kError) {
      report();
    } else if (now != serving) {
      if (on_change(static_cast<int>(now)).ptr() == Py_True) {
        serving = now;
      } else {
        shortcut.refuse();
      }
    }
  }

  void after_backward() {
    double r, lambda;
    const int everything = accumulates_everything();
    if (everything < 0) report();
    if (everything != 1) return;
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
    for (py::object* object : {&on_change, &on_check, &on_error}) visit(*object);
  }

  SingleSampleShortcut shortcut;
  std::vector<py::object> distributions;
  py::object on_change, on_check, on_error;
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

}  // namespace

void bind_single_sample(py::module_& m) {
  py::class_<SingleSampleHooks, std::shared_ptr<SingleSampleHooks>>(
      m, "SingleSampleHooks", py::custom_type_setup(&make_collectable),
      "r and lambda of single samples from two bias gradients.")
      .def(py::init<py::handle, py::handle, std::vector<py::object>, py::object, py::object, py::object>(),
           py::arg("first"), py::arg("last"), py::arg("distributions"), py::arg("on_change"), py::arg("on_check"),
           py::arg("on_error"))
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
  m.attr("SERVED") = static_cast<int>(SingleSampleShortcut::kServed);
  m.attr("CHECKED") = static_cast<int>(SingleSampleShortcut::kChecked);
}

}  // namespace lipcore
