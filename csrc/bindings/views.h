// From Python's arguments to views; errors as C++ exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

namespace py = pybind11;

inline void check(bool fine) {
  if (!fine) throw py::error_already_set();
}

inline TensorView view_of(py::handle object, const char* name, Access access = Access::kRead, int64_t index = -1) {
  TensorView view;
  check(view_tensor(object.ptr(), {name, index}, access, &view));
  return view;
}

inline TensorView integers_of(py::handle object, const char* name) {
  TensorView view;
  check(view_integers(object.ptr(), {name}, &view));
  return view;
}

// A number that stands for one of `count` enumerators, 0 upwards.
template <class Enum>
Enum enumerator_of(int value, const char* name, int count) {
  if (value < 0 || value >= count) check(fail({name}, "expected one of 0 to %d, got %d", count - 1, value));
  return static_cast<Enum>(value);
}

// A list or tuple of tensors; anything else is a TypeError that says what it was.
inline std::vector<TensorView> views_of(py::handle list, const char* name, Access access = Access::kRead) {
  if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr()))
    throw py::type_error(std::string(name) + ": expected a list or tuple of tensors, got " +
                         Py_TYPE(list.ptr())->tp_name);
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(list.ptr());
  std::vector<TensorView> views;
  views.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) views.push_back(view_of(PySequence_Fast_GET_ITEM(list.ptr(), i), name, access, i));
  return views;
}

}  // namespace lipcore
