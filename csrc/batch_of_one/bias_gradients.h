// The batch-1 shortcut. For a chain of modules that begins and ends with a Linear, the gradients of the first and the
// last bias of a single sample ARE delta and dL/dyhat. They are read the moment autograd has accumulated the first
// bias' gradient, before clipping or anything else can change it, and only when both were empty at the forward pass. In
// C++ because at batch 1 the whole training step takes 200 us, and a cold Python function 3 of them.
//
// What cannot be seen from here (a penalty on the biases in the loss, a module that makes several rows of one sample,
// two forward passes for one backward) is found by tapping the first sample and then every 256th beside it: one
// difference, and all later samples are tapped.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

class SingleSampleShortcut {
 public:
  enum Way { kError = -1, kTapped, kServed, kChecked };  // kChecked: tapped, and read from the biases too

  // first, last: modules (Linear with bias). References are taken.
  SingleSampleShortcut(PyObject* first, PyObject* last);
  SingleSampleShortcut(const SingleSampleShortcut&) = delete;
  SingleSampleShortcut& operator=(const SingleSampleShortcut&) = delete;
  ~SingleSampleShortcut() { clear(); }

  // Before the chain's forward pass on `input` (null: not known) in grad mode: how it will be observed. kError: a
  // Python exception is set.
  Way begin(PyObject* input);

  // After the first bias' gradient was accumulated: kServed or kChecked with r and lambda set, kTapped when there is
  // nothing to observe here.
  Way finish(double* r, double* lambda);

  // The pass that begin() would observe is tapped as the one before it.
  void refuse() { waiting_ = false; }

  // The biases' gradients turned out to be something else.
  void distrust() { trusted_ = false; }

  // For Python's garbage collector: hooks and model refer to each other through this object.
  int traverse(visitproc visit, void* arg) const;
  void clear();

  Py_ssize_t own_hooks = 0;  // forward hooks on the first module that are lipcore's
  int64_t served = 0;
  int64_t abandoned = 0;  // forward passes that were to be served and never had a backward

 private:
  struct Layer {
    PyObject* parameters;     // the module's _parameters dict
    PyObject* forward_hooks;  // its _forward_hooks dict
    PyObject* bias;           // as first seen; replaced ones are tapped
  };
  int layer_ready(const Layer& layer, Py_ssize_t expected_hooks) const;
  void abandon();

  Layer first_{}, last_{};
  bool trusted_ = true;
  bool waiting_ = false;  // for the backward of a forward pass that is served or checked
  bool checking_ = false;
  int until_check_ = 0;
  unsigned long thread_ = 0;  // of the first forward pass; gradients of several threads' passes mix in the biases
};

}  // namespace lipcore
