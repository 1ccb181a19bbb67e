// The parameters a plan watches. They are looked up by (owner's _parameters dict, key) at every step, so that objects
// which were replaced are seen, and checked in full only when their pointer or geometry has changed.
#pragma once

#include <string>
#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

struct ParameterEntry {
  PyObject* owner;   // dict; strong reference
  PyObject* key;     // str; strong reference
  std::string name;  // canonical, for messages
};

// Anything that changes the meaning of the flat memory: dtype, device, shape, strides.
uint64_t geometry_of(const TensorView& view);

class ParameterList {
 public:
  ParameterList() = default;
  ParameterList(const ParameterList&) = delete;
  ParameterList& operator=(const ParameterList&) = delete;
  ~ParameterList();

  // Takes over the entries' references; all parameters must be on `device` then.
  void capture(std::vector<ParameterEntry> entries, dlpack::Device device);

  // Starts a step: forgets what the last one held.
  void begin() { held_.clear(); }

  enum class Look {
    kError,  // a Python exception is set: gone, moved to another device, or no longer what it was
    kSame,   // as it was when it was accepted; `view` is filled
    kNew,    // elsewhere in memory, or seen for the first time: dense, and its storage checked
  };
  Look look_up(size_t i, TensorView* view);

  // The caller is content with what look_up() found.
  void accept(size_t i, const TensorView& view) { seen_[i] = {view.data, geometry_of(view)}; }

  // Raises ValueError "trajectory: parameter '<name>' <what>"; returns false.
  bool refuse(size_t i, const char* what) const;

  // Runs `body` with the parameters of this step held and the GIL released: without it another thread could replace one
  // in its module.
  template <class Body>
  void without_gil(const Body& body) {
    for (PyObject* parameter : held_) Py_INCREF(parameter);
    PyThreadState* state = PyEval_SaveThread();
    body();
    PyEval_RestoreThread(state);
    for (PyObject* parameter : held_) Py_DECREF(parameter);
  }

  size_t size() const { return entries_.size(); }
  const std::string& name(size_t i) const { return entries_[i].name; }

 private:
  struct Seen {
    const void* data = nullptr;
    uint64_t geometry = 0;
  };
  std::vector<ParameterEntry> entries_;
  std::vector<Seen> seen_;
  std::vector<PyObject*> held_;
  dlpack::Device device_{dlpack::kCPU, 0};
};

}  // namespace lipcore
