// The gradients of a model's parameters at batch one: whether everything about them is as it was when they proved to be
// a sample's own, and their sums of squares after a backward pass. In C++ because a step takes 200 us there, and
// looking at fifty attributes in Python 10 of them.
#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

class GradientReader {
 public:
  struct Place {
    PyObject* owner;  // the module's _parameters dict
    PyObject* key;
    PyObject* parameter;
    bool measured;  // its gradient must be empty before a backward pass
    bool read;      // and be there after it
    bool trained = false;
    Py_ssize_t hooks = 0;
  };
  struct Link {
    PyObject* owner;  // a dict
    PyObject* key;    // null: how many entries it has
    PyObject* value;
    Py_ssize_t size = 0;
  };
  enum class Found { kError = -1, kNothing, kExpected, kOthers, kStrided };

  GradientReader() = default;
  GradientReader(const GradientReader&) = delete;
  GradientReader& operator=(const GradientReader&) = delete;
  ~GradientReader() { clear(); }

  // Takes new references; false with a Python exception set.
  bool capture(const std::vector<Place>& places, const std::vector<Link>& links);

  // Every link is as it was, every parameter trained or not as before, with as many hooks, and no gradient: 1 or 0; -1
  // with a Python exception set.
  int unchanged() const;
  // kExpected: just the gradients to be read are there, and out[i] is the i-th one's sum of squares (NaN where one is
  // not finite). kStrided: one of them is not dense memory.
  Found read(double* out) const;

  size_t count() const { return read_; }
  // Among the gradients that are read; -1 where it is none.
  int64_t index_of(PyObject* parameter) const;

 private:
  void clear();
  std::vector<Place> places_;
  std::vector<Link> links_;  // of the model's modules
  size_t read_ = 0;
};

}  // namespace lipcore
