"""What rules share: the arguments of a call, and what they must look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipcore.layers.rule import Batch


def argument(
    arguments: tuple[Any, ...], keywords: dict[str, Any], position: int, name: str, default: Any = None
) -> Any:
    """Return an argument of a module's forward, given by position or by name."""
    return arguments[position] if len(arguments) > position else keywords.get(name, default)


def tensor_argument(
    arguments: tuple[Any, ...], keywords: dict[str, Any], position: int = 0, name: str = "input"
) -> Tensor:
    """Return a tensor argument of a module's forward, given by position or by name.

    Raises:
        ValueError: it is missing, not a tensor, or a nested one.
    """
    value = argument(arguments, keywords, position, name)
    if not isinstance(value, Tensor) or value.is_nested:
        got = "a nested tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor of equal samples, got {got}; use packed rows with cu_seqlens=")
    return value


def is_trainable(module: nn.Module, name: str) -> bool:
    """Return whether the module has a parameter of its own by that name which gets a gradient."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def check_channels(x: Tensor, batch: Batch, dims: int | None = None) -> None:
    r"""Check that x is [B, C, \*space], of `dims` dimensions where given.

    Raises:
        ValueError: it is not, or the samples are packed rows.
    """
    if batch.offsets is not None:
        raise ValueError(f"expected [B, C, *space], got packed rows of shape {list(x.shape)}: space cannot be packed")
    if x.dim() < 2 or (dims is not None and x.dim() != dims):
        wanted = "at least 2" if dims is None else str(dims)
        raise ValueError(
            f"expected [B, C, *space] with {wanted} dimensions, got shape {list(x.shape)}; "
            "add a batch dimension in front"
        )
    if x.shape[0] != batch.size:
        raise ValueError(
            f"expected {batch.size} samples at dimension 0, got shape {list(x.shape)}; "
            "channel layouts have the batch first, and never flatten it with another dimension"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, bfloat16 and float16 as float32, which is what layers compute in."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def as_autocast(x: Tensor) -> Tensor:
    """Return x as a layer sees it that autocast runs in lower precision; x itself where it does not.

    That copy is what torch keeps, so x may be changed in place before the backward pass, as a saved tensor may not.
    """
    if x.is_floating_point() and x.dtype != torch.float64 and _is_autocast(x.device.type):
        return x.detach().to(torch.get_autocast_dtype(x.device.type))
    return x


def apart_from_autocast(x: Tensor) -> Tensor:
    """Return x as :func:`as_autocast` does, for a layer that autocast runs in float32, which it does everywhere but on
    the CPU: a copy of what is narrower, since torch keeps it as float32."""
    narrow = x.dtype in (torch.bfloat16, torch.float16) and not x.is_cpu
    return x.detach().clone() if narrow and _is_autocast(x.device.type) else x


# Asked once: torch 2.10 does not trace the question.
_WITH_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind))


def _is_autocast(device_type: str) -> bool:
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)
