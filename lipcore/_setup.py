"""Introduces torch to the compiled core; runs once, when lipcore is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.autograd import Variable, forward_ad

from lipcore import _core, refusals


def _torch_library() -> Path:
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    return Path(torch.__file__).parent / "lib" / name


def connect() -> None:
    """Register torch's tensor types with the gatekeeper and find torch's thread pool (serial without it)."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise ImportError(f"lipcore needs torch >= 2.10 (the DLPack exchange API), found torch {torch.__version__}")
    _core.register_torch(torch.Tensor, torch.nn.Parameter, refusals.refuse, refusals.accepts)
    _core.use_torch_threads(str(_torch_library()))
    _core.register_passes(_questions())


def _questions() -> list[object]:
    """What the core asks torch about the pass under way (csrc/python/training_pass.h)."""
    keys = torch._C._TorchDispatchModeKey
    return [
        torch.is_grad_enabled,
        torch._C._current_graph_task_id,
        # What a checkpoint asks before it runs forward again: false under autograd.grad() and backward(inputs=...).
        Variable._execution_engine.is_checkpoint_valid,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._is_tracing,
        torch._C._len_torch_dispatch_stack,
        torch._C._get_dispatch_mode,
        keys.FAKE,
        keys.PROXY,
        vars(forward_ad),
    ]
