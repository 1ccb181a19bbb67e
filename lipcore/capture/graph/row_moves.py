"""Nodes of a graph that may move rows from one place to another by tensors that are others in every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.models.torch_internals import saved

_KINDS = ("Index", "UnsafeIndex", "Gather", "Scatter", "Masked", "Take", "Sort", "Topk", "Kthvalue")


def may_move(node: Any) -> bool:
    """Return whether a node's name is one of those that choose rows by the values of a tensor."""
    name: str = node.name()
    return name.startswith(_KINDS) and not name.startswith("MaskedFill")


def moves_along(node: Any, dim: int, dimensions: int) -> bool:
    """Return whether such a node chooses along a dimension of its output; those that say none may."""
    along = saved(node, "dim")
    if not isinstance(along, int):
        return True
    return along % (1 << 64) % dimensions == dim if along >= 0 else along % dimensions == dim


def keeps_samples(node: Any, samples: int) -> bool:
    """Return whether an index takes each sample's own row: `x[torch.arange(B), last]`, or none along the batch."""
    indices = saved(node, "indices")
    if not isinstance(indices, (tuple, list)) or not indices:
        return False
    first = indices[0]
    if first is None:
        return True
    if not isinstance(first, Tensor) or first.dtype == torch.bool or first.numel() != samples:
        return False
    return torch.equal(first.reshape(-1), torch.arange(samples, dtype=first.dtype, device=first.device))
