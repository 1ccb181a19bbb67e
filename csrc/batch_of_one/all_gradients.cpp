#include "batch_of_one/all_gradients.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/square_sums.h"
#include "python/training_pass.h"

namespace lipcore {
namespace {

// One reference, given back at the end of its scope.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  explicit operator bool() const { return object_ != nullptr; }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* grad_fn = PyUnicode_InternFromString("grad_fn");
  PyObject* register_prehook = PyUnicode_InternFromString("register_prehook");
  PyObject* next_functions = PyUnicode_InternFromString("next_functions");
  PyObject* variable = PyUnicode_InternFromString("variable");
};

const Names& names() {
  static const Names all;
  return all;
}

// Whether a tensor has a history: 1, 0, or -1 with a Python exception set. 0 for what is no tensor.
int has_history(PyObject* object, PyObject* tensor_type) {
  const int tensor = PyObject_IsInstance(object, tensor_type);
  if (tensor != 1) return tensor;
  const Ref history(PyObject_GetAttr(object, names().grad_fn));
  return history ? history.get() != Py_None : -1;
}

constexpr double kAgreement = 1e-5;  // of squares, which float32 rounds to 1e-6

PyObject* const* all(const SingleBatchCalls& calls) { return reinterpret_cast<PyObject* const*>(&calls); }
static_assert(sizeof(SingleBatchCalls) == kSingleBatchCalls * sizeof(PyObject*), "one reference after the other");

}  // namespace

// What a hook of the backward pass knows. It keeps the batch alive, which may have stopped serving by then.
struct SingleBatch::Backward {
  std::shared_ptr<SingleBatch> batch;
  int64_t pass, task;
  Trouble trouble;
};

SingleBatch::~SingleBatch() {
  for (int i = 0; i < kSingleBatchCalls; ++i) Py_XDECREF(all(calls_)[i]);
}

bool SingleBatch::start(const std::vector<GradientReader::Place>& places,
                        const std::vector<GradientReader::Link>& links, const SingleBatchCalls& calls,
                        Py_ssize_t batch_dim, int passes) {
  if (!reader_.capture(places, links)) return false;
  calls_ = calls;
  for (int i = 0; i < kSingleBatchCalls; ++i) Py_INCREF(all(calls_)[i]);
  batch_dim_ = batch_dim;
  left_ = passes;
  squares_.assign(reader_.count(), 0.0);
  read_ = squares_;
  return true;
}

int SingleBatch::takes(PyObject* arguments, PyObject* keywords) const {
  if (pass_ != 0 || left_ <= 0 || PyTuple_GET_SIZE(arguments) == 0) return 0;
  PyObject* sample = PyTuple_GET_ITEM(arguments, 0);
  if (reinterpret_cast<PyObject*>(Py_TYPE(sample)) != calls_.tensor_type) return 0;
  const Ref shape(PyObject_GetAttr(sample, names().shape));
  if (!shape) return -1;
  if (PyTuple_Size(shape.get()) <= batch_dim_) return 0;
  const int64_t samples = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), batch_dim_));
  if (samples != 1) return samples == -1 && PyErr_Occurred() ? -1 : 0;
  // With a history it may be the output of another pass.
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
    const int history = has_history(PyTuple_GET_ITEM(arguments, i), calls_.tensor_type);
    if (history != 0) return history < 0 ? -1 : 0;
  }
  PyObject *key, *value;
  for (Py_ssize_t at = 0; keywords && PyDict_Next(keywords, &at, &key, &value);) {
    const int history = has_history(value, calls_.tensor_type);
    if (history != 0) return history < 0 ? -1 : 0;
  }
  return reader_.unchanged();
}

bool SingleBatch::before_forward(PyObject* module, PyObject* arguments, PyObject* keywords) {
  const int training = is_training_forward();
  if (training != 1 || !active) return training >= 0;
  const int taken = takes(arguments, keywords);
  if (taken < 0) return false;
  if (taken) {
    --left_;
    pass_ = ++passes_;
    watched_ = false;
    entered_ = -1;
    differentiated_ = false;
    return true;
  }
  const Ref result(PyObject_CallFunctionObjArgs(calls_.not_served, module, arguments, keywords, nullptr));
  return static_cast<bool>(result);
}

PyObject* SingleBatch::hook(PyMethodDef* definition, int64_t pass, int64_t task, Trouble trouble) {
  auto* backward = new Backward{shared_from_this(), pass, task, trouble};
  const Ref capsule(PyCapsule_New(
      backward, nullptr, [](PyObject* self) { delete static_cast<Backward*>(PyCapsule_GetPointer(self, nullptr)); }));
  if (!capsule) {
    delete backward;
    return nullptr;
  }
  return PyCFunction_New(definition, capsule.get());
}

bool SingleBatch::after_forward(PyObject* output) {
  const int training = is_training_forward();
  if (training != 1 || watched_) return training >= 0;
  watched_ = true;
  if (output == Py_None) {  // the forward pass raised
    pass_ = 0;
    return true;
  }
  static PyMethodDef begin = {"begin_backward", &SingleBatch::begin_backward, METH_O, nullptr};
  const Ref callback(hook(&begin, pass_, -1, kNone));
  if (!callback) return false;
  if (reinterpret_cast<PyObject*>(Py_TYPE(output)) != calls_.tensor_type)
    return static_cast<bool>(Ref(PyObject_CallFunctionObjArgs(calls_.watch_outputs, output, callback.get(), nullptr)));
  const Ref history(PyObject_GetAttr(output, names().grad_fn));
  if (!history || history.get() == Py_None) return static_cast<bool>(history);
  if (last_bias_ == kUnknown && !find_last_bias(history.get())) return false;
  return static_cast<bool>(Ref(PyObject_CallMethodOneArg(history.get(), names().register_prehook, callback.get())));
}

// bias + x W^T, as the output of a Linear: the bias is the first thing it was made of.
bool SingleBatch::find_last_bias(PyObject* history) {
  last_bias_ = -1;
  if (!std::strstr(Py_TYPE(history)->tp_name, "AddmmBackward")) return true;
  const Ref next(PyObject_GetAttr(history, names().next_functions));
  const Ref first(next ? PySequence_GetItem(next.get(), 0) : nullptr);
  const Ref node(first ? PySequence_GetItem(first.get(), 0) : nullptr);
  if (!node) return false;
  const Ref leaf(PyObject_HasAttr(node.get(), names().variable) ? PyObject_GetAttr(node.get(), names().variable)
                                                                : Py_NewRef(Py_None));
  if (!leaf) return false;
  last_bias_ = reader_.index_of(leaf.get());
  return true;
}

// What torch calls: nothing may be raised inside a backward pass, so an exception is printed as one that was ignored.
PyObject* SingleBatch::begin_backward(PyObject* capsule, PyObject* output_grads) {
  const auto* backward = static_cast<Backward*>(PyCapsule_GetPointer(capsule, nullptr));
  if (!backward->batch->begin(backward->pass, output_grads)) PyErr_WriteUnraisable(nullptr);
  Py_RETURN_NONE;
}

PyObject* SingleBatch::end_backward(PyObject* capsule, PyObject*) {
  const auto* backward = static_cast<Backward*>(PyCapsule_GetPointer(capsule, nullptr));
  if (!backward->batch->end(*backward)) PyErr_WriteUnraisable(nullptr);
  Py_RETURN_NONE;
}

bool SingleBatch::begin(int64_t pass, PyObject* output_grads) {
  int64_t task;
  if (!backward_task(&task)) return false;
  if (entered_ == task) return true;  // at another output of the same pass
  entered_ = task;
  const int everything = accumulates_everything();
  const int graph = everything < 0 ? -1 : is_grad_enabled();
  if (graph < 0) return false;
  if (!everything) {  // the pass is still to come back
    differentiated_ |= pass == pass_ && graph;
    return came_back(GradientReader::Found::kNothing, kNone, task);
  }
  Trouble trouble = kNone;
  if (pass != pass_) {
    trouble = stopped_ ? kStopped : kAdded;
  } else {
    const int unchanged = reader_.unchanged();  // a hook on a parameter may be there since, too
    if (unchanged < 0) return false;
    trouble = !unchanged ? kAdded : graph || differentiated_ ? kGraph : kNone;
  }
  expected_sq_ = std::nan("");
  if (trouble == kNone && last_bias_ >= 0 && PyTuple_Check(output_grads) && PyTuple_GET_SIZE(output_grads) == 1) {
    TensorView grad;
    StepSums sums;
    if (view_tensor(PyTuple_GET_ITEM(output_grads, 0), {"grad"}, Access::kRead, &grad) && grad.is_dense() &&
        square_sums({grad}, &sums))
      expected_sq_ = sums.dw_sq;
    PyErr_Clear();  // a gradient that is no tensor, or of another kind: nothing is known then
  }
  // queue_callback() calls without an argument; METH_NOARGS passes a null one.
  static PyMethodDef end = {"end_backward", &SingleBatch::end_backward, METH_NOARGS, nullptr};
  const Ref callback(hook(&end, pass, task, trouble));
  return callback && Ref(PyObject_CallOneArg(calls_.queue_callback, callback.get()));
}

bool SingleBatch::end(const Backward& backward) {
  const auto found = reader_.read(read_.data());
  if (found == GradientReader::Found::kError) {
    if (!PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_TypeError)) return false;
    PyErr_Clear();  // a gradient of another kind than before: Python says so
  }
  Trouble trouble = backward.trouble;
  if (trouble == kNone && backward.pass != pass_) trouble = kStopped;  // meanwhile, by another thread's pass
  if (found == GradientReader::Found::kNothing && trouble == kNone) {
    entered_ = -1;  // it accumulated nothing: the pass is still to come back
  } else if (backward.pass == pass_) {
    pass_ = 0;
  }
  if (found == GradientReader::Found::kExpected && trouble == kNone &&
      std::abs(read_[static_cast<size_t>(std::max<int64_t>(last_bias_, 0))] - expected_sq_) > kAgreement * expected_sq_)
    trouble = kElsewhere;
  if (found == GradientReader::Found::kExpected && trouble == kNone) {
    squares_.swap(read_);
    task_ = backward.task;
    if (!sink_.distributions.empty()) {
      take_in();
      return true;
    }
  }
  return came_back(found, trouble, backward.task);
}

bool SingleBatch::came_back(GradientReader::Found found, Trouble trouble, int64_t task) {
  const Ref result(PyObject_CallFunction(calls_.came_back, "iiL", static_cast<int>(found), static_cast<int>(trouble),
                                         static_cast<long long>(task)));
  return static_cast<bool>(result);
}

void SingleBatch::set_sink(Sink sink) {
  sink_ = std::move(sink);
  nothing_.assign(sink_.distributions.size(), std::nan(""));
  for (const int64_t k : sink_.index) nothing_[static_cast<size_t>(k)] = 0.0;
  if (!nothing_.empty()) nothing_.back() = 0.0;
}

void SingleBatch::take_in() {
  sums_ = nothing_;
  for (size_t i = 0; i < squares_.size(); ++i) {
    const double square = sink_.factor_sq * squares_[i];
    sums_[static_cast<size_t>(sink_.index[i])] += square;
    sums_.back() += square;
  }
  for (size_t k = 0; k < sums_.size(); ++k) sink_.distributions[k]->observe(std::sqrt(sums_[k]));
  total_ = sums_.back();
  pending_ = true;
}

}  // namespace lipcore
