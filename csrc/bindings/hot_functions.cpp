// Hot ops are plain C functions: pybind11's dispatcher would cost as much as the kernel.
#include <vector>

#include "bindings/bind.h"
#include "bindings/views.h"
#include "ops/outer_norms.h"
#include "ops/sample_norms.h"
#include "python/training_pass.h"

namespace lipcore {
namespace {

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

// An answer of training_pass.h.
template <int (*question)()>
PyObject* py_answer(PyObject*, PyObject*) {
  const int answer = question();
  return answer < 0 ? nullptr : PyBool_FromLong(answer);
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
    {"is_plain_run", &py_answer<&is_plain_run>, METH_NOARGS,
     "is_plain_run()\n--\n\nWhether no transform of torch.func, forward AD, tracing, fake tensors or pause() are at "
     "work."},
    {"is_training_forward", &py_answer<&is_training_forward>, METH_NOARGS,
     "is_training_forward()\n--\n\nWhether a forward pass that begins or ends now is the training's."},
    {"accumulates_everything", &py_answer<&accumulates_everything>, METH_NOARGS,
     "accumulates_everything()\n--\n\nWhether the backward pass under way accumulates the gradients of all leaves."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_hot_functions(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kHotMethods) != 0) throw py::error_already_set();
}

}  // namespace lipcore
