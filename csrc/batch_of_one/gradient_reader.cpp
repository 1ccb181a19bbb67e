#include "batch_of_one/gradient_reader.h"

#include "ops/square_sums.h"
#include "python/attributes.h"

namespace lipcore {
namespace {

struct Names {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* hooks[2] = {PyUnicode_InternFromString("_backward_hooks"),
                        PyUnicode_InternFromString("_post_accumulate_grad_hooks")};
};

const Names& names() {
  static const Names all;
  return all;
}

Py_ssize_t hooks_of(PyObject* parameter) {
  Py_ssize_t count = 0;
  for (PyObject* name : names().hooks) {
    PyObject* hooks = PyObject_GetAttr(parameter, name);
    if (!hooks) return -1;
    const Py_ssize_t more = hooks == Py_None ? 0 : PyObject_Size(hooks);
    Py_DECREF(hooks);
    if (more < 0) return -1;
    count += more;
  }
  return count;
}

}  // namespace

bool GradientReader::capture(const std::vector<Place>& places, const std::vector<Link>& links) {
  clear();
  for (const Link& link : links) {
    for (PyObject* object : {link.owner, link.key, link.value}) Py_XINCREF(object);
    links_.push_back(link);
  }
  for (Place place : places) {
    const int trained = attribute_is(place.parameter, names().requires_grad, Py_True);
    place.hooks = hooks_of(place.parameter);
    if (trained < 0 || place.hooks < 0) return false;
    place.trained = trained == 1;
    for (PyObject* object : {place.owner, place.key, place.parameter}) Py_INCREF(object);
    places_.push_back(place);
    read_ += place.read;
  }
  return true;
}

void GradientReader::clear() {
  for (Place& place : places_)
    for (PyObject* object : {place.owner, place.key, place.parameter}) Py_DECREF(object);
  for (Link& link : links_)
    for (PyObject* object : {link.owner, link.key, link.value}) Py_XDECREF(object);
  places_.clear();
  links_.clear();
  read_ = 0;
}

int GradientReader::unchanged() const {
  for (const Link& link : links_) {
    const bool same =
        link.key ? PyDict_GetItemWithError(link.owner, link.key) == link.value : PyDict_Size(link.owner) == link.size;
    if (!same) return PyErr_Occurred() ? -1 : 0;
  }
  for (const Place& place : places_) {
    if (PyDict_GetItemWithError(place.owner, place.key) != place.parameter) return PyErr_Occurred() ? -1 : 0;
    const int trained = attribute_is(place.parameter, names().requires_grad, place.trained ? Py_True : Py_False);
    if (trained != 1) return trained;
    const int empty = attribute_is(place.parameter, names().grad, Py_None);
    if (empty != 1) return empty;
    const Py_ssize_t hooks = hooks_of(place.parameter);
    if (hooks != place.hooks) return hooks < 0 ? -1 : 0;
  }
  return 1;
}

int64_t GradientReader::index_of(PyObject* parameter) const {
  int64_t index = 0;
  for (const Place& place : places_) {
    if (place.read && place.parameter == parameter) return index;
    index += place.read;
  }
  return -1;
}

GradientReader::Found GradientReader::read(double* out) const {
  std::vector<PyObject*> held;  // a view borrows from its tensor
  std::vector<TensorView> views;
  views.reserve(read_);
  size_t others = 0, present = 0;
  bool fine = true, dense = true;
  for (const Place& place : places_) {
    if (!place.measured) continue;
    PyObject* grad = PyObject_GetAttr(place.parameter, names().grad);
    if (!grad) {
      fine = false;
      break;
    }
    held.push_back(grad);
    if (grad == Py_None) continue;
    if (!place.read) {
      ++others;
      continue;
    }
    ++present;
    TensorView view;
    if (!view_tensor(grad, {"grad", static_cast<int64_t>(present) - 1}, Access::kRead, &view)) {
      fine = false;
      break;
    }
    dense = dense && view.is_dense() && view.on_cpu();
    views.push_back(view);
  }
  Found found = Found::kError;
  if (fine) {
    found = present + others == 0             ? Found::kNothing
            : others != 0 || present != read_ ? Found::kOthers
            : !dense                          ? Found::kStrided
                                              : Found::kExpected;
    if (found == Found::kExpected) {
      std::vector<StepSums> sums(views.size());
      if (!square_sums(views, sums.data())) found = Found::kError;
      for (size_t i = 0; i < sums.size(); ++i) out[i] = sums[i].dw_sq;
    }
  }
  for (PyObject* grad : held) Py_DECREF(grad);
  return found;
}

}  // namespace lipcore
