"""Whose parts of a gradient are, and one step of carrying that to what is behind a node.

Ids are int64 tensors on the CPU that broadcast to the gradient: a dimension is 1 where all along it is the same
sample's. NOBODY's elements have no gradient. None stands for "cannot be told": sums over samples, unknown nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipcore.models.torch_internals import saved

NOBODY = -1
Shape = tuple[int, ...]


class Step(NamedTuple):
    """The way from a node to one behind it.

    Attributes:
        node: of the graph.
        edge: the number of the edge.
        ids: per output of the node; None where its gradient is nobody's that is known.
        outs: the shapes of the outputs.
        shape: that of the gradient that the edge takes.
        others: shapes at all edges; None where there is none.
    """

    node: Any
    edge: int
    ids: Sequence[Tensor | None]
    outs: tuple[Shape, ...]
    shape: Shape
    others: Sequence[Shape | None]


Rule = Callable[[Step, Tensor], Tensor | None]


def merged(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the ids of a sum of two gradients; None where both have one of another sample at the same place."""
    if first is None or second is None or first is second:
        return first if first is second else None
    if first.shape == second.shape and torch.equal(first, second):
        return first
    if bool(((first != second) & (first != NOBODY) & (second != NOBODY)).any()):
        return None
    return torch.where(first == NOBODY, second, first)


def narrowed(ids: Tensor) -> Tensor:
    """Return ids with one element in the place of each dimension along which all are the same, or nobody's."""
    for dim, size in enumerate(ids.shape):
        if size > 1:
            highest = ids.amax(dim, keepdim=True)
            ids = highest if bool(((ids == highest) | (ids == NOBODY)).all()) else ids
    return ids


def integer(value: int) -> int:
    """Return a dimension as it was given: nodes keep negative ones as unsigned."""
    return value - (1 << 64) if value >= 1 << 63 else value


def dim_of(step: Step, dimensions: int) -> int:
    return integer(saved(step.node, "dim")) % dimensions


def is_one(ids: Tensor, dims: Sequence[int]) -> bool:
    return all(ids.shape[d] == 1 for d in dims)


def summed_to(ids: Tensor, shape: Shape) -> Tensor | None:
    """Return the ids where broadcasting is undone: what is summed up has to be one sample's."""
    more = ids.dim() - len(shape)
    if more < 0 or not is_one(ids, range(more)):
        return None
    ids = ids.reshape(ids.shape[more:])
    return ids if all(size in (1, full) for size, full in zip(ids.shape, shape, strict=True)) else None


def placed(ids: Tensor, rows: Tensor, dim: int, size: int) -> Tensor:
    """Return the ids of a tensor of which rows along a dimension were taken, where their own are all along it."""
    found = ids.new_full([*ids.shape[:dim], size, *ids.shape[dim + 1 :]], NOBODY)
    return found.index_copy_(dim, rows, ids.expand(*ids.shape[:dim], len(rows), *ids.shape[dim + 1 :]))


def scattered(ids: Tensor, places: Tensor, count: int) -> Tensor | None:
    """Return the ids, [count], of rows that were taken so often; None where two samples took the same."""
    highest = ids.new_full([count], NOBODY).scatter_reduce_(0, places, ids, "amax")
    other = (highest[places] != ids) & (ids != NOBODY)
    return None if bool(other.any()) else highest
