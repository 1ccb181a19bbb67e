// The stateful form of the sketch: parameters looked up at every step, their sketches and weights in tensors that
// belong to Python.
#pragma once

#include <memory>
#include <vector>

#include "ops/sketch.h"
#include "trajectory/parameter_list.h"

namespace lipcore {

namespace cuda {
class SketchRunner;
}

struct SketchPlace {
  int64_t first_index;  // global index of the parameter's first element
  int64_t row;          // the sketch it is added to
};

class SketchPlan {
 public:
  SketchPlan() = default;
  SketchPlan(const SketchPlan&) = delete;
  SketchPlan& operator=(const SketchPlan&) = delete;
  ~SketchPlan();

  // Takes over the entries' references. sketches float64 [rows, buckets] and weights float64 [entries, 2], contiguous
  // and on one device, with the parameters. False with a Python exception set.
  bool capture(std::vector<ParameterEntry> entries, std::vector<SketchPlace> places, PyObject* sketches,
               PyObject* weights, uint64_t seed);

  // Reads every parameter once and overwrites sketches and weights. False with a Python exception set, nothing written,
  // when a parameter is gone or not what it was. On a CUDA device the work is queued on torch's current stream.
  bool step();

 private:
  bool look_up_all();

  ParameterList parameters_;
  std::vector<SketchPlace> places_;
  std::vector<SketchItem> items_;
  PyObject* owned_[2] = {};
  double* sketches_ = nullptr;
  SketchWeight* weights_ = nullptr;
  dlpack::Device device_{dlpack::kCPU, 0};
  bool moved_ = false;  // a pointer in items_ has changed since the last step on a CUDA device
  SketchRunner runner_;
  std::shared_ptr<cuda::SketchRunner> cuda_runner_;  // shared: it knows how to end what only a core with CUDA can see
};

}  // namespace lipcore
