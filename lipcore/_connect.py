"""Where torch and the compiled core meet: the core learns of torch once, when lipcore is imported, and tensors that the
gatekeeper refuses get their words here.

The gatekeeper (``csrc/python/tensor_view.cpp``) decides; it calls :func:`refuse` for anything that is not a plain
floating tensor with memory behind it, and :func:`accepts` once per tensor type.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lipcore import _core
from lipcore.models.torch_internals import MKLDNN_LAYOUT, is_functorch_wrapped, questions_about_the_pass


def _torch_library() -> Path:
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    return Path(torch.__file__).parent / "lib" / name


def connect() -> None:
    """Register torch's tensor types with the gatekeeper and find torch's thread pool (serial without it)."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise ImportError(f"lipcore needs torch >= 2.10 (the DLPack exchange API), found torch {torch.__version__}")
    _core.register_torch(torch.Tensor, torch.nn.Parameter, refuse, accepts)
    _core.use_torch_threads(str(_torch_library()))
    _core.register_passes(questions_about_the_pass())
    if _core.cuda_built and torch.backends.cuda.is_built() and _sees_a_gpu():
        _warn_of_cuda()


def _sees_a_gpu() -> bool:
    """Return whether this process may use an NVIDIA GPU; initialises nothing of CUDA, so that it can fork later."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/usr/lib/wsl/lib/libcuda.so.1").exists()


def _warn_of_cuda() -> None:
    """Warn where the core's kernels cannot run on any GPU here: their first call would raise the same."""
    if trouble := _core.cuda_trouble():
        warnings.warn(trouble, RuntimeWarning, stacklevel=4)  # the line that imports lipcore


# ---- tensors that are refused

_DTYPES = "float32, float64, bfloat16 or float16"


def accepts(tensor_type: type) -> bool:
    """Return whether objects of this type are plain tensors: torch.Tensor or a subclass that does not intercept
    operators."""
    return (
        issubclass(tensor_type, torch.Tensor)
        and tensor_type.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not issubclass(tensor_type, UninitializedTensorMixin)
    )


def refuse(value: Any, name: str, index: int) -> NoReturn:
    """Raise the TypeError or ValueError that names the argument, says what it was and what to do instead."""
    argument = f"{name}[{index}]" if index >= 0 else name
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {_describe_object(value)}")
    error, what = _describe_tensor(value)
    raise error(f"{argument}: {what}")


def _describe_object(value: Any) -> str:
    if value is None:
        return "None; pass a tensor (is a gradient missing? it is None before backward and after zero_grad)"
    if isinstance(value, np.ndarray):
        return f"a numpy array of dtype {value.dtype}; pass torch.from_numpy(array)"
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return f"the number {value!r}; pass torch.tensor([{value!r}])"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__}; pass one tensor, for numbers torch.tensor(...), for tensors torch.stack(...)"
    return f"{type(value).__module__}.{type(value).__qualname__}; pass a tensor"


def _describe_tensor(tensor: torch.Tensor) -> tuple[type[TypeError] | type[ValueError], str]:
    kind = type(tensor)
    if isinstance(tensor, UninitializedTensorMixin):
        return ValueError, "is uninitialised (a lazy module's parameter); run one forward pass first"
    if kind.__name__ == "FakeTensor":
        return TypeError, "is a fake tensor without data (tracing or export); call this outside tracing"
    if kind.__name__ == "DTensor":
        return TypeError, "is a DTensor (distributed); pass its shard, tensor.to_local()"
    if is_functorch_wrapped(tensor):
        return TypeError, "is wrapped by a torch.func transform (vmap, grad, ...); call this outside the transform"
    if tensor.is_nested:
        return TypeError, "is a nested tensor; pass one dense tensor per component, tensor.unbind()"
    if not accepts(kind):
        return TypeError, (
            f"is a tensor subclass, {kind.__module__}.{kind.__qualname__}, whose memory only it can read; "
            "unwrap it to the plain tensor inside"
        )
    if tensor.layout == MKLDNN_LAYOUT:
        return TypeError, "has the mkldnn layout; pass tensor.to_dense()"
    if tensor.layout != torch.strided:
        return TypeError, f"is sparse ({tensor.layout}); pass tensor.to_dense(), or its values"
    if tensor.is_quantized:
        return TypeError, f"is quantized ({tensor.dtype}); pass tensor.dequantize()"
    if tensor.device.type == "meta":
        return ValueError, "is on the meta device and has no data; materialise it on a real device first"
    if tensor.device.type not in ("cpu", "cuda"):
        return ValueError, f"is on device '{tensor.device}'; lipcore runs on cpu and cuda, pass tensor.cpu()"
    return _describe_dense(tensor)


def _describe_dense(tensor: torch.Tensor) -> tuple[type[TypeError] | type[ValueError], str]:
    dtype = tensor.dtype
    if dtype.is_complex:
        return TypeError, f"has dtype {dtype}; pass torch.view_as_real(tensor), or its real and imaginary part"
    if dtype == torch.bool or not dtype.is_floating_point:
        return TypeError, f"has dtype {dtype}; expected {_DTYPES}: pass tensor.float()"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return TypeError, f"has dtype {dtype}, too coarse for statistics; expected {_DTYPES}: pass tensor.float()"
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        return ValueError, "its storage was resized to zero bytes (freed by FSDP or resize_); pass a tensor with memory"
    return TypeError, f"of shape {list(tensor.shape)} cannot be read through DLPack; pass tensor.contiguous()"
