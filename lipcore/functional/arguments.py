"""What the per-sample operations ask of their arguments, and the shapes their kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipcore import _core

_INTEGERS = (torch.int64, torch.int32)
_CPU = torch.device("cpu")  # torch.set_default_device() may be another


def resolved(tensor: Tensor, name: str, index: int = -1) -> Tensor:
    """Let the gatekeeper check a tensor; return it, or a copy where it has the negative bit. name[index] in a list."""
    return tensor.resolve_neg() if _core.check_storage(tensor, name, index) else tensor


def readable(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor as :func:`resolved` does, detached."""
    tensor = resolved(tensor, name)
    return tensor.detach() if tensor.requires_grad else tensor


def check_state(tensor: Tensor, name: str, index: int = -1) -> None:
    """Raise ValueError where a tensor that is written to cannot be; name[index] in a list."""
    if _core.check_storage(tensor, name, index):
        argument = f"{name}[{index}]" if index >= 0 else name
        raise ValueError(
            f"{argument}: carries the negative bit, so writing to its memory would flip signs; pass a plain tensor"
        )


def same_place(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: is on {tensor.device} but {other_name} is on {other.device}; put both on one device")


def rows(tensor: Tensor, name: str, packed: bool) -> Tensor:
    """Return [B, T, F] of [B, ..., F] or [B], and [1, N, F] of packed rows [N, F]."""
    dimensions = tensor.dim()
    if packed:
        if dimensions != 2:
            raise ValueError(f"{name}: expected packed rows [N, F] beside offsets, got {list(tensor.shape)}")
        return tensor[None]
    if dimensions == 3:
        return tensor
    if not dimensions:
        raise ValueError(f"{name}: expected shape [B, ..., F], got a 0-dimensional tensor; use x.reshape(1, 1)")
    last = tensor.shape[-1] if tensor.dim() > 1 else 1
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), last)


def integers(tensor: Tensor, name: str) -> Tensor:
    """Return an integer tensor as the core takes it, int64 and dense; it has no negative bit and no gradient."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS or tensor.layout != torch.strided:
        what = f"dtype {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {what}")
    return tensor.to(torch.int64).contiguous()


def packed_offsets(offsets: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the offsets as checked int64 [B + 1] beside the rows; whether they ascend from 0 to N is for the core to
    see."""
    if offsets is None:
        return None
    offsets = integers(offsets, "offsets")
    if offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"offsets: expected shape [B + 1], from 0 to the number of rows, got {list(offsets.shape)}")
    return offsets if offsets.device == like.device else offsets.to(like.device)


def of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, which autocast may have left in different types, in their common one."""
    dtype = tensors[0].dtype
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def result_beside(tensor: Tensor, *shape: int) -> Tensor:
    """Return memory for a result in float64 on the tensor's device."""
    if tensor.is_cpu:
        return torch.empty(shape, dtype=torch.float64, device=_CPU)
    return tensor.new_empty(shape, dtype=torch.float64)


def flat_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def within_range(found: Tensor, compute: Callable[..., Tensor], tensors: tuple[Tensor, ...], power: int) -> Tensor:
    """Return what compute(*tensors), of degree `power` in each of them, has found. Where float64 overflowed on the way
    it is called again with scaled tensors, so that finite input gives no NaN: what is not finite then was not finite
    in the input, or is too large. float32 and less cannot get there."""
    if all(t.dtype != torch.float64 for t in tensors) or bool(found.isfinite().all()):
        return found
    exponents, scaled = 0, []
    for tensor in tensors:
        largest = torch.where(tensor.isfinite(), tensor, 0).abs().amax() if tensor.numel() else tensor.new_zeros(())
        exponent = max(-1000, int(torch.frexp(largest.to(torch.float64)).exponent))
        scaled.append(tensor.to(torch.float64) * 2.0**-exponent)
        exponents += exponent
    again, exponents = compute(*scaled), power * exponents
    # In steps: the factor alone may be outside float64's range.
    while exponents:
        step = max(-512, min(512, exponents))
        again, exponents = again * 2.0**step, exponents - step
    return torch.where(found.isfinite(), found, again)
