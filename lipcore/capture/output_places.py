"""Where the samples are in what a model returns, as a pass on one sample more shows it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipcore.capture.graph.row_views import turns_of_output
from lipcore.layers import Batch
from lipcore.models.outputs import tensors_of


class OutputPlace(NamedTuple):
    """The place of the samples in one tensor.

    Attributes:
        dim: the batch's dimension.
        each: how many rows of it every sample has.
        turns: samples take turns; else the rows of one stand together.
    """

    dim: int
    each: int = 1
    turns: bool = False

    def samples(self, size: int) -> Tensor:
        """Return the sample of each row, of so many, int64."""
        order = torch.arange(size, device="cpu")
        return order.repeat(self.each) if self.turns else order.repeat_interleave(self.each)


#: By tensor of an output, in their order; None for those without the batch, and where it cannot be told.
OutputPlaces = list[OutputPlace | None]


def places_of(output: Any, other: Any, batch: Batch) -> OutputPlaces | None:
    """Return where the samples are in each tensor of an output; None where the other has fewer tensors. It may have
    more: one of the sample more.

    Args:
        output: what a model has returned of a batch.
        other: what it returns of the same with its last sample twice.
        batch: the samples.
    """
    mine, theirs = list(tensors_of(output)), list(tensors_of(other))
    if len(mine) > len(theirs):
        return None
    return [_place(one, two, batch) for one, two in zip(mine, theirs, strict=False)]


def is_clear(output: Any, batch: Batch) -> bool:
    """Return whether the shapes of an output alone say where its samples are: there are tensors with as many rows as
    samples in the dimension where they are to be, and in no other."""
    if batch.offsets is not None:
        return True
    found = False
    for tensor in tensors_of(output):
        shape = tuple(tensor.shape)
        if tensor.grad_fn is None or not shape:
            continue
        if shape[batch.dim if len(shape) > batch.dim else 0] == batch.size:
            found = True
            if shape.count(batch.size) > 1:
                return False
    return found


def _place(one: Tensor, two: Tensor, batch: Batch) -> OutputPlace | None:
    samples, expected = batch.size, batch.dim if one.dim() > batch.dim else 0
    dims = [d for d, (n, m) in enumerate(zip(one.shape, two.shape, strict=False)) if n != m]
    if one.dim() != two.dim() or not dims:
        return None
    if len(dims) > 1:  # similarities, which mix samples
        return OutputPlace(expected) if expected in dims and one.shape[expected] == samples else None
    (dim,) = dims
    rows, each = one.shape[dim], one.shape[dim] // samples
    if each * samples != rows or each * (samples + 1) != two.shape[dim]:
        return None
    if each == 1:
        return OutputPlace(dim)
    turns = None if dim else turns_of_output(one.grad_fn, two.grad_fn, rows)
    turns = _turns_by_copies(two.detach().movedim(dim, 0), samples, each) if turns is None else turns
    return None if turns is None else OutputPlace(dim, each, turns)


def _turns_by_copies(rows: Tensor, samples: int, each: int) -> bool | None:
    """Return whether samples take turns in rows of which the last two samples are the same; None where that shows
    nothing (random numbers)."""
    blocks, turns = rows.unflatten(0, (samples + 1, each)), rows.unflatten(0, (each, samples + 1))
    alike = torch.equal(blocks[-1], blocks[-2]), torch.equal(turns[:, -1], turns[:, -2])
    return alike[1] if alike[0] != alike[1] else None
