"""Introduces torch to the compiled core; runs once, when lipcore is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

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
