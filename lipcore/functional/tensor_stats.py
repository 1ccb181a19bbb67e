"""Statistics of the elements of tensors, and tables of them that are merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional.arguments import check_state, resolved
from lipcore.functional.tensor_stats_rows import add_on_device, merged_rows
from lipcore.models.arguments import is_integer

_MOST_DIMENSIONS = 8  # that the core walks through without a copy


def tensor_stats(
    tensors: Sequence[Tensor], *, into: tuple[Tensor, Tensor] | None = None, places: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Compute count, mean, sums of powers of deviations, extremes, zeros, non-finite elements and a histogram of
    magnitudes of every tensor, in one reading of its memory.

    With n finite elements x_i and their mean, the columns of a row are n, :math:`\bar x`,
    :math:`M_k = \sum_i (x_i - \bar x)^k` for k = 2, 3, 4, :math:`\min x_i`, :math:`\max x_i`, the number of zeros and
    that of NaN and infinite elements, which enter nothing else. So the standard deviation is :math:`\sqrt{M_2/n}` and
    the kurtosis (3 of a normal distribution) :math:`n M_4/M_2^2`. A tensor without finite elements has zeros in the
    first columns. Bin b of the histogram counts the finite elements with :math:`b = \lfloor 8 (e + m) \rfloor`, where
    e and 1 + m are the exponent and the mantissa of \|x\| as a float32: eight bins per power of two, bin 0 for zero.

    Of float64 tensors the sums of powers are only as large as float64 goes: about 1e77 for the elements of M_4.

    Args:
        tensors: any shapes and strides, all on one device.
        into: rows and bins of earlier calls, float64 [n, 9] and int64 [n, 2048] there; the statistics are merged into
            them by Pebay's formulas, as if all elements had come at once.
        places: the row of `into` that each tensor goes to, each at most once. Without: 0, 1, ...

    Returns:
        rows, float64 [n, 9], and bins, int64 [n, 2048], on that device: `into` where it was given.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use. Nothing has been written then.

    Source: Chan, Golub, LeVeque (1983); Pebay, "Formulas for robust, one-pass parallel computation of covariances and
    arbitrary-order statistical moments" (2008).

    >>> tensor_stats([torch.tensor([1.0, 2.0, 3.0, float("nan")])])[0]
    tensor([[3., 2., 2., 0., 2., 1., 3., 0., 1.]], dtype=torch.float64)
    """
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"tensors: expected a list or tuple of tensors, got {type(tensors).__name__}")
    if into is not None and not (isinstance(into, tuple) and len(into) == 2):
        raise TypeError(f"into: expected a tuple of rows and bins, got {type(into).__name__}")
    if places is None:
        places = range(len(tensors))
    elif into is None:
        raise ValueError("places: they are rows of into=, which is missing")
    elif len(places) != len(tensors):
        raise ValueError(f"places: expected {len(tensors)} places, one per tensor, got {len(places)}")
    elif not all(is_integer(place) for place in places):
        raise ValueError(f"places: expected integers, got {list(places)}")
    readable = [_readable(resolved(tensor, "tensors", i)) for i, tensor in enumerate(tensors)]
    if into is None:
        rows, bins = empty_tensor_stats(len(tensors), readable[0].device if readable else _library.CPU)
    else:
        rows, bins = into
        check_state(rows, "rows")
    _add(readable, places, rows, bins)
    return rows, bins


def add_tensor_stats(tensors: Sequence[Tensor], into: tuple[Tensor, Tensor], places: Sequence[int]) -> None:
    """Add tensors of one device to rows and bins there, as :func:`tensor_stats` does with `into`, whose tables and
    places are the caller's own and so are right."""
    _add([_readable(resolved(tensor, "tensors", i)) for i, tensor in enumerate(tensors)], places, *into)


def _add(tensors: Sequence[Tensor], places: Sequence[int], rows: Tensor, bins: Tensor) -> None:
    if rows.is_cpu or _core.cuda_built:
        _core.tensor_stats(tensors, places, rows, bins)
    else:
        add_on_device(tensors, places, rows, bins)


def empty_tensor_stats(places: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and bins of nothing: what others can be merged into."""
    rows = torch.zeros(places, _core.TENSOR_STATS, dtype=torch.float64, device=device)
    return rows, torch.zeros(places, _core.TENSOR_BINS, dtype=torch.int64, device=device)


def merge_tensor_stats(
    into: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], places: Sequence[int], *, gone: bool = False
) -> None:
    """Merge row i of another table into row places[i] of this one, on one device; on the CPU a place may come more than
    once, and one below 0 takes nothing. With `gone` the other table, one of tensor_stats(), is left without what went
    over."""
    (rows, bins), (other_rows, other_bins) = into, other
    if rows.is_cpu:
        _core.merge_tensor_stats(other_rows, other_bins, places, rows, bins, gone)
        return
    if list(places) != list(range(len(rows))):
        raise ValueError("places: on a device rows are merged into those of their own number")
    rows.copy_(merged_rows(rows, other_rows))
    bins.add_(other_bins)
    if gone:
        other_rows.zero_()
        other_bins.zero_()


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy where the kernel of its device cannot walk through it."""
    if tensor.is_cpu and tensor.dim() <= _MOST_DIMENSIONS:
        return tensor
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.detach().contiguous()
