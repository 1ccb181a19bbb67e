"""Where the elements of a tensor lie, which decides what operations run (a product of a transposed tensor is another
one)."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """Return x with its elements in the order of memory of another tensor with as many dimensions, with a gap
    where that has gaps."""
    strides, size, theirs = [0] * x.dim(), 1, 1  # next to come: of x, and of the other one
    for dim in sorted(range(x.dim()), key=lambda d: (other.stride(d), other.shape[d])):
        if other.stride(dim) == 0:  # expanded
            continue
        # Least gaps: those of a few columns of a large table would take its memory. Rows that overlap (of an unfold)
        # cannot be written; they lie apart here.
        strides[dim] = size + (other.stride(dim) != theirs)
        size, theirs = strides[dim] * x.shape[dim], max(1, other.stride(dim) * other.shape[dim])
    once = x[tuple(slice(0, 1) if other.stride(d) == 0 else slice(None) for d in range(x.dim()))]
    found = torch.empty_strided(once.shape, strides, dtype=x.dtype, device=x.device)
    return found.copy_(once).expand(x.shape)
