// Attributes of Python objects, looked at without pybind11.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace lipcore {

// object.<name> is <wanted>: 1, 0, or -1 with a Python exception set.
inline int attribute_is(PyObject* object, PyObject* name, PyObject* wanted) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) return -1;
  const bool same = value == wanted;
  Py_DECREF(value);
  return same;
}

}  // namespace lipcore
