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
      (n > 0 && out.strides[1] != 1)) {
    fail({"out"}, "expected a contiguous float64 tensor of shape [%lld, %d], got %s %s", static_cast<long long>(n),
         kStepSums, dtype_name(out.dtype), ShapeText(out).text);
    return Found::kError;
  }
  views_.clear();
  TensorView nothing{};  // in the place of a gradient that is not there
  nothing.device = out.device;
  Found found = Found::kPlain;
  for (size_t i = 0; i < entries_.size() && found == Found::kPlain; ++i) {
    PyObject* gradient = nullptr;
    TensorView view;
    if (!look_up(entries_[i], &gradient)) {
      found = PyErr_Occurred() ? Found::kError : Found::kUnusual;
      break;
    }
    held_.push_back(gradient);
    if (gradient == Py_None) {
      views_.push_back(nothing);
      continue;
    }
    if (!view_tensor(gradient, {"grad", static_cast<int64_t>(i)}, Access::kRead, &view)) {
      PyErr_Clear();  // the slow way says it in words, or can do with it
      found = Found::kUnusual;
    } else if (!view.same_device(out) || !view.is_dense()) {
      found = Found::kUnusual;
    } else {
      views_.push_back(view);
    }
  }
  if (found == Found::kPlain && !square_sums(views_, static_cast<StepSums*>(out.data), out.device))
    found = Found::kError;
  for (PyObject* gradient : held_) Py_DECREF(gradient);
  held_.clear();
  return found;
}

}  // namespace lipcore
