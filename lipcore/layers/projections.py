"""Inner products of a tensor with a few random ones of its shape, by which two tensors are compared that are never
both at hand.

The random ones are outer products of a vector per dimension (those behind the second in one). So the gradient of a
linear layer, a sum of outer products, need not be made: its inner products come from its factors. Tensors that differ
have other ones, but for a set of measure zero; their mean square is about that of the difference.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

PROJECTIONS = 4
_KEPT = 1 << 20  # the longest that are kept: 32 MiB, of a large vocabulary
LAST = 2  # the number of a tensor's last dimension, whatever its number of dimensions


def projected(tensor: Tensor) -> Tensor:
    """Return a tensor's inner products with the random ones of its shape, float64 [PROJECTIONS]."""
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    tensor = tensor.flatten(2) if tensor.dim() > 3 else tensor if tensor.dim() else tensor[None]
    with torch.autocast(tensor.device.type, enabled=False):
        return _projected(tensor)


def _projected(tensor: Tensor) -> Tensor:
    found = projected_rows(tensor, LAST).reshape(PROJECTIONS, *tensor.shape[:-1])
    for axis in reversed(range(tensor.dim() - 1)):
        along = directions(axis, tensor, axis).double()
        found = (found * along.reshape(PROJECTIONS, *[1] * axis, tensor.shape[axis])).sum(-1)
    return found.reshape(PROJECTIONS)  # of a vector


def projected_rows(rows: Tensor, axis: int) -> Tensor:
    """Return the inner products of the rows of a tensor [..., n] with the random vectors for one dimension of tensors,
    float64 [PROJECTIONS, N]."""
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1]).to(torch.promote_types(rows.dtype, torch.float32))
    products: Tensor = directions(axis, flat) @ flat.T  # this way round BLAS takes half the time
    return products.double()


def directions(axis: int, like: Tensor, dim: int = -1) -> Tensor:
    """Return the random vectors for one dimension of tensors, [PROJECTIONS, size], on the device of `like`, of its
    type in float32 at least.

    Args:
        axis: the number of the dimension, LAST for the last.
        like: a tensor that has a dimension of this size.
        dim: the number of that dimension in it.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    size = like.shape[dim]
    return (_random if size <= _KEPT else _random.__wrapped__)(axis, size, like.device, dtype)


@functools.lru_cache(maxsize=256)
def _random(axis: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Signs and sizes: numbers near 0 would hide elements, and signs alone would let two that are alike cancel.
    generator = torch.Generator().manual_seed(3 * size + axis)
    numbers = torch.rand(PROJECTIONS, size, generator=generator, dtype=torch.float64, device="cpu") - 0.5
    return (numbers.sign() * (0.5 + 2 * numbers.abs())).to(device, dtype)
