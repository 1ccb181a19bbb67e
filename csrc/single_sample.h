// The batch-1 shortcut. For a chain of modules that begins and ends with a Linear, the gradients of the first and the
// last bias of a single sample ARE delta and dL/dyhat. They are read the moment autograd has accumulated the first
// bias' gradient, before clipping or anything else can change it, and only when both were empty at the forward pass. In
// C++ because at batch 1 the whole training step takes 200 us, and a cold Python function 3 of them.
#pragma once

#include "distribution.h"
#include "tensor_view.h"

namespace lipcore {

class SingleSampleShortcut {
 public:
  // first, last: modules (Linear with bias); ratios, lambdas: what finish() observes into. References are taken.
  SingleSampleShortcut(PyObject* first, PyObject* last);
  SingleSampleShortcut(const SingleSampleShortcut&) = delete;
  SingleSampleShortcut& operator=(const SingleSampleShortcut&) = delete;
  ~SingleSampleShortcut();

  // Before the chain's forward pass on `input` in grad mode: 1 it will be served from the biases, 0 it must be tapped,
  // -1 a Python exception is set.
  int begin(PyObject* input);

  // After the first bias' gradient was accumulated: false with a Python exception set.
  bool finish(Distribution* ratios, Distribution* lambdas, Distribution* paired);

  Py_ssize_t own_hooks = 0;  // forward hooks on the first module that are lipcore's
  int64_t served = 0;

 private:
  struct Layer {
    PyObject* parameters;     // the module's _parameters dict
    PyObject* forward_hooks;  // its _forward_hooks dict
    PyObject* bias;           // as first seen; replaced ones are tapped
  };
  int layer_ready(const Layer& layer, Py_ssize_t expected_hooks) const;

  Layer first_{}, last_{};
  bool waiting_ = false;  // for the backward of a forward pass that is served
};

}  // namespace lipcore
