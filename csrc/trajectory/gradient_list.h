// The gradients of the parameters that a plan watches, looked up anew at every step. In C++ because a step takes 200 us
// at batch one, and looking at ten gradients in Python 20 of them.
#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

struct GradientEntry {
  PyObject* owner;   // dict; strong reference
  PyObject* key;     // str; strong reference
  PyObject* shadow;  // the parameter whose master copy the dict holds, or null; strong reference
};

class GradientList {
 public:
  GradientList() = default;
  GradientList(const GradientList&) = delete;
  GradientList& operator=(const GradientList&) = delete;
  ~GradientList();

  // Takes over the entries' references.
  void capture(std::vector<GradientEntry> entries);

  enum class Found {
    kError,    // a Python exception is set
    kPlain,    // out[i] is the step of a tensor that moved by the i-th gradient; of none, zeros
    kUnusual,  // a parameter is gone, or a gradient is sparse, sharded, strided or elsewhere; out is as it was
  };
  Found read(const TensorView& out);

 private:
  bool look_up(const GradientEntry& entry, PyObject** gradient) const;

  std::vector<GradientEntry> entries_;
  std::vector<PyObject*> held_;  // a view borrows from its tensor
  std::vector<TensorView> views_;
};

}  // namespace lipcore
