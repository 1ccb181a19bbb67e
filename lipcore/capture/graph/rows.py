"""Whose the rows of a gradient at the frontier are: samples one after the other, taking turns, or in an order of the
model's."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.foreign_functions import is_foreign
from lipcore.capture.graph.frontier import Frontier
from lipcore.capture.graph.walk import Walk
from lipcore.capture.once_only import why_once_only
from lipcore.capture.proof import (
    BITS,
    BITS_OF_FLOAT16,
    MIXED,
    NO_GRADIENT,
    NOT_FINITE,
    Point,
    RowIds,
    row_ids,
)
from lipcore.capture.seeds import Seeds
from lipcore.capture.zero_mixing import mixes_by_zero

_MIXES = (
    "where it meets the batch, rows of its gradient have parts of several samples: the model mixes its samples, or "
    "returns rows in another order beside what the loss is made of (name that, output='<key or module>')"
)
_MOVED = (
    "where it meets the batch, the rows are in an order of the model's own (routing, sorting), which may be another in "
    "every pass"
)
_CHANGED = "where it meets the batch, the order of the samples' rows is another one than in earlier passes"
_NO_GRADIENT = "in no proof so far the rows of every parameter that the autograd graph measures had a gradient"
_NO_OUTPUT = "none of the model's outputs has a batch dimension, by which rows could be told"
_FAILED = "its graph allows no other backward pass ({0})"
Points = list[tuple[int, int, int]]  # place of a node, number of its output, dimension of the rows
_TRUE = torch.ones((), dtype=torch.bool)
_TOLERANCE = {torch.float64: 2e-9, torch.float32: 2e-5}


class Order(Enum):
    """The order of the samples' rows: those of one sample after those of the one before, or in turns; EITHER where
    every sample has had one row."""

    BLOCKS = "blocks"
    TURNS = "turns"
    EITHER = "either"

    @functools.lru_cache(maxsize=64)
    def samples(self, rows: int, samples: int) -> Tensor:
        """Return the sample of each row, int64 [rows], which is not to be written to."""
        numbers = torch.arange(rows, device="cpu")
        return numbers % samples if self is Order.TURNS else numbers // (rows // samples)

    def groups(self, rows: int, samples: int) -> Tensor:
        """Return the number of each row's group, of which a proof must have seen one row: a sample's, or a turn."""
        numbers = torch.arange(rows, device="cpu")
        return numbers // samples if self is Order.TURNS else numbers // (rows // samples)


@dataclass
class RowOrders:
    """Findings about the rows at the frontier of one structure.

    Attributes:
        orders: by place of a frontier node.
        wrong: places whose rows are not those of single samples, and why.
        unproved: why the orders are those that the shapes suggest, or "".
        moved: of these, places whose rows are in an order of the model's own.
        unreached: places that no gradient came to from the outputs.
        silent: places where no row had a gradient in any proof: every row is one that no proof has seen.
        not_finite: the last proof met rows that are not finite, of which it shows nothing.
        by_zero: samples are mixed by factors that were 0 in a pass that was proved.
        views: whether samples take turns at a place, as far as views say it; asked where no proof has told.
    """

    orders: dict[int, Order] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)
    unproved: str = ""
    moved: set[int] = field(default_factory=set)
    unreached: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    not_finite: bool = False
    by_zero: bool = False
    views: Mapping[int, bool] = field(default_factory=dict)
    _last: weakref.ref[Walk] | None = None  # the pass that was proved last
    _seen: dict[int, Tensor] = field(default_factory=dict)  # by place, the groups of rows that had a gradient

    def samples(self, place: int, rows: int, samples: int) -> Tensor:
        """Return the sample of each row of a frontier node's gradient."""
        order = self.orders.get(place, Order.EITHER)
        if order is Order.EITHER and self.views.get(place):
            order = Order.TURNS
        return order.samples(rows, samples)

    def untold(self, place: int, rows: int, samples: int) -> bool:
        """Return whether neither a proof nor a view says whose the rows at a place are."""
        return rows != samples and place not in self.views and self.orders.get(place, Order.EITHER) is Order.EITHER

    def unseen(self, place: int, rows: int, samples: int) -> Tensor | None:
        """Return which rows of a frontier node's gradient are of groups that no proof has seen, bool [rows]; None where
        there are none."""
        seen = self._seen.get(place)
        if seen is None or bool(seen.all()):
            return None
        groups = self.orders.get(place, Order.EITHER).groups(rows, samples)
        return ~torch.where(groups < len(seen), seen[groups.clamp(max=len(seen) - 1)], False)

    def open(self, walk: Walk, frontier: Frontier, samples: int, *, silent: bool = False) -> bool:
        """Return whether the order of some rows is not known for tensors of these sizes; with `silent`, of those too
        that had no gradient."""
        left_out = self.unreached if silent else self.unreached | self.silent
        nodes = {p: frontier.rows(p, walk) for p in frontier.nodes if p not in left_out}
        return any(n != samples for p, n in nodes.items() if self.orders.get(p, Order.EITHER) is Order.EITHER)

    def proved_in(self, walk: Walk) -> bool:
        """Return whether the rows of this very pass were proved."""
        return self._last is not None and self._last() is walk

    def prove(self, walk: Walk, frontier: Frontier, seeds: Seeds) -> None:
        """Find the samples of all rows by backward passes from outputs with weights."""
        self._last = weakref.ref(walk)
        once = next((why for node in walk.nodes if (why := why_once_only(node))), "")
        if once or not seeds.outputs:
            self.unproved = once or _NO_OUTPUT
            return
        try:
            found = _ids(walk, frontier.nodes, seeds)
            self.by_zero = self.by_zero or _mixes_by_zero(walk, _outputs(frontier.nodes), seeds, found)
        except RuntimeError as error:
            self.unproved = _FAILED.format(str(error)[:200])
            return
        reached = {place for place, ids in found if ids is not None}
        self.unreached = {place for place, _ in found} - reached
        self.not_finite = any(bool((ids == NOT_FINITE).any()) for _, ids in found if ids is not None)
        for place, ids in found:
            if ids is not None:
                self._take(place, ids, seeds.size)
        self.unproved = _NO_GRADIENT if self.open(walk, frontier, seeds.size) else ""

    def confirmed(self, walk: Walk, frontier: Frontier, whose: Mapping[int, Tensor], seeds: Seeds) -> set[int] | None:
        """Find the samples of rows that were carried from the frontier by backward passes too; return the places where
        some row was found, None where a row is another sample's or of several."""
        try:
            found = _ids(walk, {place: frontier.nodes[place] for place in whose}, seeds)
        except RuntimeError:
            return None
        known = {place: ids >= 0 for place, ids in found if ids is not None}
        for place, ids in found:
            if ids is not None and (bool((ids == MIXED).any()) or bool((ids != whose[place])[known[place]].any())):
                return None
        return {place for place, mask in known.items() if bool(mask.any())}

    def _take(self, place: int, ids: Tensor, samples: int) -> None:
        known = ids >= 0
        quiet = bool((ids == NO_GRADIENT).all()) and (place in self.silent or place not in self.orders)
        (self.silent.add if quiet else self.silent.discard)(place)
        fits = [o for o in (Order.BLOCKS, Order.TURNS) if torch.equal(o.samples(len(ids), samples)[known], ids[known])]
        before = self.orders.get(place, Order.EITHER)
        if bool((ids == MIXED).any()):
            self.wrong[place] = _MIXES
        elif not fits:
            self.wrong[place] = _MOVED
            self.moved.add(place)
        elif before is not Order.EITHER and before not in fits:
            self.wrong[place] = _CHANGED
        else:
            order = self.orders[place] = fits[0] if len(fits) == 1 else before
            groups = order.groups(len(ids), samples)
            seen = torch.zeros(int(groups.max()) + 1, dtype=torch.bool, device="cpu").index_put_(
                (groups[known],), _TRUE
            )
            earlier = self._seen.get(place)
            self._seen[place] = seen | earlier if earlier is not None and len(earlier) == len(seen) else seen


def _outputs(nodes: Mapping[int, tuple[int | None, ...]]) -> Points:
    return [(place, number, dim) for place, at in nodes.items() for number, dim in enumerate(at) if dim is not None]


def _ids(walk: Walk, nodes: Mapping[int, tuple[int | None, ...]], seeds: Seeds) -> list[tuple[int, Tensor | None]]:
    """Return places with the samples of the rows at each output of these nodes, as weighted backward passes find them;
    None where no gradient comes."""
    outputs = _outputs(nodes)
    points = _points(walk, outputs)
    dtypes = {data.dtype for node in walk.nodes for data in node._input_metadata}
    half = bool(dtypes & {torch.float16, torch.bfloat16})
    found = row_ids(
        seeds,
        points,
        bits=BITS_OF_FLOAT16 if torch.float16 in dtypes else BITS,
        tolerance=6e-2 if half else _TOLERANCE[torch.float64 if dtypes == {torch.float64} else torch.float32],
        foreign=[node for node in walk.nodes if is_foreign(node)],
    )
    return [(p, None if rows is None else rows.ids) for (p, _, _), rows in zip(outputs, found, strict=True)]


def _mixes_by_zero(walk: Walk, points: Points, seeds: Seeds, found: Sequence[tuple[int, Tensor | None]]) -> bool:
    rows = [None if ids is None else RowIds(ids, 0.0, ids) for _, ids in found]
    return mixes_by_zero(seeds, _points(walk, points), rows)


def _points(walk: Walk, outputs: Points) -> list[Point]:
    return [Point(walk.nodes[place], _Squares(dim), number) for place, number, dim in outputs]


def as_real(tensor: Tensor) -> Tensor:
    """Return a tensor of real numbers with the same norm, where it is complex with one dimension more."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class _Squares:
    """Function that takes a gradient to the squared norms of its rows along a dimension."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __call__(self, gradient: Any) -> Tensor:
        real = as_real(gradient)
        count = real.shape[self._dim]
        rows: Tensor = real.movedim(self._dim, 0).reshape(count, real.numel() // max(1, count))
        return rows.double().square().sum(1)
