// Batches of one while their norms are read from the gradients (lipcore/capture/single_gradient.py): what happens
// before and after the model's forward pass, and at the beginning and the end of the backward pass. In C++ because at
// batch one a step takes 200 us, and each cold Python function 3 to 5 of them.
#pragma once

#include <memory>
#include <vector>

#include "batch_of_one/gradient_reader.h"
#include "distribution.h"

namespace lipcore {

// References to Python objects that a SingleBatch calls.
struct SingleBatchCalls {
  PyObject* tensor_type;     // torch.Tensor
  PyObject* queue_callback;  // of autograd: at the end of the backward pass
  PyObject* not_served;      // (module, arguments, keywords): a forward pass that has to be tapped
  PyObject* watch_outputs;   // (output, hook): of outputs that are no tensor
  PyObject* came_back;       // (found, trouble, task): a backward pass whose numbers were not taken in here
};
constexpr int kSingleBatchCalls = 5;

class SingleBatch : public std::enable_shared_from_this<SingleBatch> {
 public:
  // kAdded: a gradient was there already. kGraph: create_graph=True. kElsewhere: the last layer's gradient is not what
  // came to the output, so something else than the output reached the parameters (a penalty in the loss, say).
  // kStopped: another forward pass began before its backward pass.
  enum Trouble { kNone, kAdded, kGraph, kElsewhere, kStopped };

  SingleBatch() = default;
  SingleBatch(const SingleBatch&) = delete;
  SingleBatch& operator=(const SingleBatch&) = delete;
  ~SingleBatch();

  // Serves so many forward passes; the places as GradientReader has them. Takes new references. False with a Python
  // exception set, as from every function here that returns bool.
  bool start(const std::vector<GradientReader::Place>& places, const std::vector<GradientReader::Link>& links,
             const SingleBatchCalls& calls, Py_ssize_t batch_dim, int passes);

  // The model's hooks.
  bool before_forward(PyObject* module, PyObject* arguments, PyObject* keywords);
  bool after_forward(PyObject* output);

  // Where norms go without a call: the roots of factor_sq times the sums of squares of the gradients with index[i] = k
  // into distribution k, and of all of them into the last one. A distribution that no gradient goes to counts a missing
  // value: a layer that the pass did not reach.
  struct Sink {
    std::vector<int64_t> index;
    std::vector<Distribution*> distributions;  // the caller keeps them alive
    double factor_sq = 1;
  };
  void set_sink(Sink sink);
  void remove_sink() { sink_ = {}; }
  bool pending() const { return pending_; }  // the sink took in a pass that take() has not been called for
  double total() const { return total_; }    // its squared norm
  void take() { pending_ = false; }
  // Of the last backward pass that brought what was expected.
  int64_t task() const { return task_; }
  const std::vector<double>& squares() const { return squares_; }

  // Serves no more: true when a forward pass waits for its backward pass, whose numbers will not count.
  bool stop() {
    const bool waiting = pass_ != 0;
    pass_ = 0;
    stopped_ = true;
    watched_ = true;
    remove_sink();
    return waiting;
  }
  bool active = true;  // false in steps that are not recorded

 private:
  struct Backward;
  static PyObject* begin_backward(PyObject* capsule, PyObject*);
  static PyObject* end_backward(PyObject* capsule, PyObject*);
  PyObject* hook(PyMethodDef* definition, int64_t pass, int64_t task, Trouble trouble);
  bool begin(int64_t pass, PyObject* output_grads);
  bool find_last_bias(PyObject* history);
  bool end(const Backward& backward);
  bool came_back(GradientReader::Found found, Trouble trouble, int64_t task);
  void take_in();
  int takes(PyObject* arguments, PyObject* keywords) const;

  GradientReader reader_;
  SingleBatchCalls calls_{};
  Py_ssize_t batch_dim_ = 0;
  int left_ = 0;      // passes until the next proof
  int64_t pass_ = 0;  // the served pass without its backward pass; 0: none
  int64_t passes_ = 0;
  bool stopped_ = false;
  bool watched_ = true;          // that pass has an output
  int64_t entered_ = -1;         // the backward pass that entered its graph
  bool differentiated_ = false;  // with create_graph=True, by a backward pass that accumulated nothing
  int64_t task_ = -1;
  // Where the output comes from a Linear: its bias among the gradients that are read, -1 where it does not, and the
  // squared norm that the bias' gradient must have in the backward pass under way, NaN where that is not known.
  int64_t last_bias_ = kUnknown;
  static constexpr int64_t kUnknown = -2;
  double expected_sq_ = 0;
  std::vector<double> squares_, read_, sums_;
  std::vector<double> nothing_;  // what the sums begin with: 0, or NaN where no gradient goes
  Sink sink_;
  bool pending_ = false;
  double total_ = 0;
};

}  // namespace lipcore
