#include "batch_of_one/bias_gradients.h"

#include <initializer_list>
#include <utility>

#include "ops/first_layer_norms.h"
#include "python/attributes.h"

namespace lipcore {
namespace {

constexpr int kCheckEvery = 256;  // a check costs about one small step: 0.4 % this way

struct Names {
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* backward_hooks = PyUnicode_InternFromString("_backward_hooks");
};

const Names& names() {
  static const Names all;
  return all;
}

}  // namespace

SingleSampleShortcut::SingleSampleShortcut(PyObject* first, PyObject* last) {
  for (const auto& [layer, module] : {std::pair{&first_, first}, {&last_, last}}) {
    layer->parameters = PyObject_GetAttrString(module, "_parameters");
    layer->forward_hooks = PyObject_GetAttrString(module, "_forward_hooks");
    layer->bias = PyObject_GetAttrString(module, "bias");
  }
}

int SingleSampleShortcut::traverse(visitproc visit, void* arg) const {
  for (const Layer& layer : {first_, last_})
    for (PyObject* object : {layer.parameters, layer.forward_hooks, layer.bias}) Py_VISIT(object);
  return 0;
}

void SingleSampleShortcut::clear() {
  trusted_ = waiting_ = false;
  for (Layer* layer : {&first_, &last_})
    for (PyObject** object : {&layer->parameters, &layer->forward_hooks, &layer->bias}) Py_CLEAR(*object);
}

// The bias is the one we know, trainable, without a gradient yet, and nobody rewrites its gradient or the layer's
// output.
int SingleSampleShortcut::layer_ready(const Layer& layer, Py_ssize_t expected_hooks) const {
  if (PyDict_GetItemWithError(layer.parameters, names().bias) != layer.bias) return PyErr_Occurred() ? -1 : 0;
  if (PyDict_Size(layer.forward_hooks) != expected_hooks) return 0;
  for (const auto& [name, wanted] :
       {std::pair{names().grad, Py_None}, {names().requires_grad, Py_True}, {names().backward_hooks, Py_None}}) {
    const int same = attribute_is(layer.bias, name, wanted);
    if (same != 1) return same;
  }
  return 1;
}

// The sample that was to be read from the biases is lost to them; the next ones are tapped.
void SingleSampleShortcut::abandon() {
  abandoned += !checking_;
  trusted_ = waiting_ = false;
}

SingleSampleShortcut::Way SingleSampleShortcut::begin(PyObject* input) {
  // A forward pass whose backward has not come yet: taps can tell the two apart, bias gradients cannot.
  if (waiting_) abandon();
  if (!thread_) thread_ = PyThread_get_thread_ident();
  if (thread_ != PyThread_get_thread_ident()) trusted_ = false;
  if (!trusted_ || !input) return kTapped;
  TensorView x;
  if (!view_tensor(input, {"input"}, Access::kRead, &x)) {
    PyErr_Clear();  // whatever it is, the model's forward will say so
    return kTapped;
  }
  if (x.ndim != 2 || x.shape[0] != 1) return kTapped;
  int ready = layer_ready(first_, own_hooks);
  if (ready == 1) ready = layer_ready(last_, 0);
  // A pruned or parametrised weight is not a parameter of the layer.
  if (ready == 1 && !PyDict_GetItemWithError(first_.parameters, names().weight)) ready = PyErr_Occurred() ? -1 : 0;
  if (ready != 1) return ready < 0 ? kError : kTapped;
  waiting_ = true;
  checking_ = until_check_ == 0;
  until_check_ = checking_ ? kCheckEvery - 1 : until_check_ - 1;
  return checking_ ? kChecked : kServed;
}

SingleSampleShortcut::Way SingleSampleShortcut::finish(double* r, double* lambda) {
  if (!waiting_) return kTapped;
  PyObject* weight = PyDict_GetItemWithError(first_.parameters, names().weight);
  PyObject* delta = PyObject_GetAttr(first_.bias, names().grad);
  PyObject* output_grad = delta ? PyObject_GetAttr(last_.bias, names().grad) : nullptr;
  Way way = kError;
  if (output_grad && (!weight || output_grad == Py_None)) {
    if (!PyErr_Occurred()) way = kTapped;  // a backward pass into some parameters only
    abandon();
  } else if (output_grad) {
    TensorView d, g, w;
    const bool fine = view_tensor(delta, {"delta"}, Access::kRead, &d) &&
                      view_tensor(output_grad, {"output_grad"}, Access::kRead, &g) &&
                      view_tensor(weight, {"weight"}, Access::kRead, &w) && sample_ratio(d, g, w, r, lambda);
    if (fine) way = checking_ ? kChecked : kServed;
  }
  Py_XDECREF(delta);
  Py_XDECREF(output_grad);
  waiting_ = false;
  served += way == kServed;
  return way;
}

}  // namespace lipcore
