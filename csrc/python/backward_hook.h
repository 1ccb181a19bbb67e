// A hook on many tensors that calls once per backward pass. In C++ because it runs once per parameter and step.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace lipcore {

// BackwardHook(begin=None): a callable for Tensor.register_post_accumulate_grad_hook that calls begin() when it is
// called first in a backward pass. forget() makes the next call a first one again. A copied or pickled one does
// nothing. A new reference; null with a Python exception set.
PyObject* make_backward_hook_type();

}  // namespace lipcore
