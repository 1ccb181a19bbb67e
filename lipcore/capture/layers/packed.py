"""Boundaries of packed sequences: checks that they fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipcore.functional.dtypes import INTEGERS
from lipcore.layers import Batch


def boundaries(offsets: Any) -> Tensor:
    """Return packed sequences' boundaries as int64 [B + 1], a copy, since a buffer may be filled anew before the
    backward pass. Values are checked where that does not wait for a device."""
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or not len(offsets) or offsets.dtype not in INTEGERS:
        got = f"{offsets.dtype} {list(offsets.shape)}" if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ValueError(f"cu_seqlens: expected boundaries, integers of shape [B + 1], got {got}")
    found: Tensor = offsets.detach().to(torch.int64, copy=True)
    if found.is_cpu and (found[0] != 0 or bool((found.diff() < 0).any())):
        raise ValueError(f"cu_seqlens: expected boundaries from 0 in ascending order, got {found.tolist()[:16]}")
    return found


def batch_of_call(batch: Batch, output: Tensor, features: int) -> Batch:
    """Return the batch of a layer's call that has returned this: of documents, one whose rows are a document's each
    where there are as many rows as documents (pooled ones), and not as many as the boundaries say."""
    offsets = batch.offsets
    if offsets is None or not offsets.is_cpu or output.dim() <= features or output.shape[0] != batch.size:
        return batch
    rows = math.prod(output.shape[: output.dim() - features])
    return batch if rows == int(offsets[-1]) else Batch(batch.size)


def check_rows(output: Tensor, features: int, offsets: Tensor) -> None:
    """Raise ValueError unless the boundaries end with the last row of an output whose last `features` dimensions hold
    features."""
    if output.dim() <= features:
        raise ValueError(
            f"cu_seqlens: expected packed rows [total, features], got an output of shape {list(output.shape)}, which "
            "has no dimension of features; give the layer an input with one (unsqueeze(-1))"
        )
    rows = math.prod(output.shape[: output.dim() - features])
    if offsets.is_cpu and rows != int(offsets[-1]):
        raise ValueError(f"cu_seqlens: the boundaries end at {int(offsets[-1])}, but there are {rows} rows")
