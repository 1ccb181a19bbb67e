// Which forward and backward passes are the training's: one answer for every hook, in C++ or Python, that has to ask.
// In C++ because hooks ask it several times a step, and a step takes 200 us at batch one.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

namespace lipcore {

// What torch is asked; Python registers these once, in this order.
struct TorchPasses {
  PyObject* grad_enabled;   // torch.is_grad_enabled
  PyObject* backward_task;  // the number of the backward pass under way, -1 outside
  PyObject* unrestricted;   // in a hook of a backward pass: whether it executes all that it reaches
  PyObject* transform;      // torch.func's innermost transform, or None
  PyObject* tracing;        // whether torch.jit.trace runs
  PyObject* modes;          // how many dispatch modes are on
  PyObject* mode;           // (key): the innermost mode of a kind, or None
  PyObject* fake_key;       // of fake tensors
  PyObject* proxy_key;      // of make_fx
  PyObject* forward_ad;     // the dict that has _current_level, -1 outside of dual_level()
};
constexpr int kTorchPasses = 10;

// Takes new references.
void register_torch_passes(const TorchPasses& passes);

// All return 1 or 0, or -1 with a Python exception set.
//
// What runs now runs as it is written: in no transform of torch.func, no forward AD, not traced, not on fake tensors,
// in no pass of lipcore's own.
int is_plain_run();
// A forward pass that begins or ends now is the training's: a plain run in grad mode, in no backward pass (a checkpoint
// runs forward again there).
int is_training_forward();
// Asked in a hook of a backward pass: it accumulates the gradients of all leaves that it reaches, as autograd.grad()
// and backward(inputs=) do not.
int accumulates_everything();
int is_grad_enabled();
// The number of the backward pass under way, -1 outside; false with a Python exception set.
bool backward_task(int64_t* task);

// Forward passes of this thread are lipcore's own until as many pause_recording(-1) as pause_recording(1) were called.
void pause_recording(int by);
bool is_paused();

}  // namespace lipcore
