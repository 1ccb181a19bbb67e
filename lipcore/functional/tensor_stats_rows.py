"""Rows of :func:`lipcore.functional.tensor_stats` in torch's operations: merged, and made where no kernel serves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core

_CHUNK = 1 << 22  # elements that are held in float64 at a time
_COUNT, _MEAN, _M2, _M3, _M4, _MIN, _MAX, _ZEROS, _NONFINITE = range(_core.TENSOR_STATS)


def merged_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows of all elements from those of two parts of them, [..., 9], by Pebay's formulas; see merge() in
    csrc/math/tensor_stats.h."""
    x, y = a.unbind(-1), b.unbind(-1)
    n, m = x[_COUNT], y[_COUNT]
    both = n + m
    d = y[_MEAN] - x[_MEAN]
    share = d / both.clamp(min=1)
    product = n * m * d * share
    m2 = x[_M2] + y[_M2] + product
    m3 = x[_M3] + y[_M3] + product * share * (n - m) + 3 * share * (n * y[_M2] - m * x[_M2])
    m4 = x[_M4] + y[_M4] + product * share * share * (n * n - n * m + m * m)
    m4 = m4 + 6 * share * share * (n * n * y[_M2] + m * m * x[_M2]) + 4 * share * (n * y[_M3] - m * x[_M3])
    low, high = torch.minimum(x[_MIN], y[_MIN]), torch.maximum(x[_MAX], y[_MAX])
    numbers = torch.stack([both, x[_MEAN] + share * m, m2, m3, m4, low, high], dim=-1)
    # Where one is empty the other as it is, which formulas with infinite numbers would not give.
    numbers = torch.where((n == 0).unsqueeze(-1), b[..., :_ZEROS], numbers)
    numbers = torch.where((m == 0).unsqueeze(-1), a[..., :_ZEROS], numbers)
    return torch.cat([numbers, a[..., _ZEROS:] + b[..., _ZEROS:]], dim=-1)


def add_on_device(tensors: Sequence[Tensor], places: Sequence[int], rows: Tensor, bins: Tensor) -> None:
    """Add tensors to rows and bins of the same device, without waiting for it."""
    for tensor, place in zip(tensors, places, strict=True):
        for part in tensor.detach().reshape(-1).split(_CHUNK):
            if part.numel():
                rows[place] = merged_rows(rows[place], _row_of(part, bins[place]))


def _row_of(x: Tensor, bins: Tensor) -> Tensor:
    """Return the row of a flat tensor that is not empty, and add it to the bins."""
    finite = x.isfinite()
    value = torch.where(finite, x, 0.0).double()
    count = finite.sum().double()
    mean = value.sum() / count.clamp(min=1)
    low, high = torch.where(finite, value, torch.inf).amin(), torch.where(finite, value, -torch.inf).amax()
    mean = torch.where(low == high, low, mean)
    d = torch.where(finite, value - mean, 0.0)
    square = d * d
    # Beyond float32's range a value becomes infinite: the last page of the bins.
    places = (value.abs().float().view(torch.int32) >> 20).long()
    bins.index_add_(0, places, finite.long())
    numbers = [count, mean, square.sum(), (square * d).sum(), (square * square).sum(), low, high]
    row = torch.stack([*numbers, (finite & (value == 0)).sum().double(), (~finite).sum().double()])
    row[:_ZEROS] = torch.where(count > 0, row[:_ZEROS], 0.0)
    return row
