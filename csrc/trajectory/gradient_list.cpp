#include "trajectory/gradient_list.h"

#include "ops/square_sums.h"
#include "python/tensor_text.h"

namespace lipcore {

GradientList::~GradientList() {
  for (const GradientEntry& entry : entries_) {
    Py_XDECREF(entry.owner);
    Py_XDECREF(entry.key);
    Py_XDECREF(entry.shadow);
  }
}

void GradientList::capture(std::vector<GradientEntry> entries) { entries_ = std::move(entries); }

// False when there is no such parameter, or with a Python exception set. The reference is the caller's.
bool GradientList::look_up(const GradientEntry& entry, PyObject** gradient) const {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  PyObject* parameter = entry.shadow ? entry.shadow : PyDict_GetItemWithError(entry.owner, entry.key);
  if (!parameter || parameter == Py_None) return false;
  *gradient = PyObject_GetAttr(parameter, name);
  return *gradient != nullptr;
}

GradientList::Found GradientList::read(const TensorView& out) {
  const int64_t n = static_cast<int64_t>(entries_.size());
  if (out.dtype != DType::kFloat64 || out.ndim != 2 || out.shape[0] != n || out.shape[1] != kStepSums ||
      !out.on_cpu()) {
    fail({"out"}, "expected a float64 CPU tensor of shape [%lld, %d], got %s %s", static_cast<long long>(n), kStepSums,
         dtype_name(out.dtype), ShapeText(out).text);
    return Found::kError;
  }
  views_.clear();
  index_.clear();
  Found found = Found::kPlain;
  for (size_t i = 0; i < entries_.size() && found == Found::kPlain; ++i) {
    PyObject* gradient = nullptr;
    TensorView view;
    if (!look_up(entries_[i], &gradient)) {
      found = PyErr_Occurred() ? Found::kError : Found::kUnusual;
      break;
    }
    held_.push_back(gradient);
    if (gradient == Py_None) continue;
    if (!view_tensor(gradient, {"grad", static_cast<int64_t>(i)}, Access::kRead, &view)) {
      PyErr_Clear();  // the slow way says it in words, or can do with it
      found = Found::kUnusual;
    } else if (!view.on_cpu() || !view.is_dense()) {
      found = Found::kUnusual;
    } else {
      views_.push_back(view);
      index_.push_back(i);
    }
  }
  if (found == Found::kPlain) {
    auto* sums = static_cast<StepSums*>(out.data);
    if (!square_sums(views_, sums)) found = Found::kError;
    // Where some have none, the others' move up from the end, so that none is overwritten before it was moved.
    for (size_t i = entries_.size(), k = index_.size(); found == Found::kPlain && k < i;) {
      --i;
      if (k > 0 && index_[k - 1] == i)
        sums[i] = sums[--k];
      else
        sums[i] = {};
    }
  }
  for (PyObject* gradient : held_) Py_DECREF(gradient);
  held_.clear();
  return found;
}

}  // namespace lipcore
