#include "python/training_pass.h"

namespace lipcore {
namespace {

TorchPasses torch{};
thread_local int paused = 0;

// call() is <wanted>: 1, 0, or -1 with a Python exception set.
int returns(PyObject* call, PyObject* wanted, PyObject* argument = nullptr) {
  PyObject* result = argument ? PyObject_CallOneArg(call, argument) : PyObject_CallNoArgs(call);
  if (!result) return -1;
  const bool same = result == wanted;
  Py_DECREF(result);
  return same;
}

bool number_of(PyObject* call, int64_t* number) {
  PyObject* result = PyObject_CallNoArgs(call);
  if (!result) return false;
  *number = PyLong_AsLongLong(result);
  Py_DECREF(result);
  return *number != -1 || !PyErr_Occurred();
}

// Inside torch.autograd.forward_ad.dual_level().
int in_forward_ad() {
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* level = PyDict_GetItemWithError(torch.forward_ad, name);
  if (!level) return PyErr_Occurred() ? -1 : 0;
  const int64_t number = PyLong_AsLongLong(level);
  return number == -1 && PyErr_Occurred() ? -1 : number >= 0;
}

}  // namespace

void register_torch_passes(const TorchPasses& passes) {
  torch = passes;
  for (int i = 0; i < kTorchPasses; ++i) Py_INCREF(reinterpret_cast<PyObject* const*>(&torch)[i]);
}
static_assert(sizeof(TorchPasses) == kTorchPasses * sizeof(PyObject*), "one reference after the other");

int is_plain_run() {
  if (is_paused()) return 0;
  const int transformed = returns(torch.transform, Py_None);
  if (transformed != 1) return transformed;
  const int traced = returns(torch.tracing, Py_False);
  if (traced != 1) return traced;
  const int dual = in_forward_ad();
  if (dual != 0) return dual < 0 ? -1 : 0;
  int64_t modes;
  if (!number_of(torch.modes, &modes)) return -1;
  if (modes == 0) return 1;
  const int fake = returns(torch.mode, Py_None, torch.fake_key);
  return fake != 1 ? fake : returns(torch.mode, Py_None, torch.proxy_key);
}

int is_training_forward() {
  const int grad = is_grad_enabled();
  if (grad != 1) return grad;
  int64_t task;
  if (!backward_task(&task)) return -1;
  return task != -1 ? 0 : is_plain_run();
}

int accumulates_everything() { return returns(torch.unrestricted, Py_True); }

int is_grad_enabled() { return returns(torch.grad_enabled, Py_True); }

bool backward_task(int64_t* task) { return number_of(torch.backward_task, task); }

void pause_recording(int by) { paused += by; }

bool is_paused() { return paused > 0; }

}  // namespace lipcore
