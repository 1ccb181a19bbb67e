"""Whose the rows of a gradient at the frontier are: samples one after the other, taking turns, or in an order of the
model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.capture.foreign_functions import is_foreign
from lipcore.capture.graph.frontier import Frontier, Walk
from lipcore.capture.proof import BITS, BITS_OF_FLOAT16, MIXED, Point, row_ids
from lipcore.capture.seeds import Seeds

_MIXES = "where it meets the batch, rows of its gradient have parts of several samples: the model mixes its samples"
_ORDER = (
    "where it meets the batch, the rows are in an order of the model's own (routing, sorting), which may be another in "
    "every pass"
)
_TOLERANCE = {torch.float64: 2e-9, torch.float32: 2e-5}


def in_order(rows: int, samples: int) -> Tensor:
    """Return, for each row, the sample it belongs to where samples stand one after the other."""
    return torch.arange(rows, device="cpu") // (rows // samples)


def rows_by_shape(frontier: Frontier, samples: int) -> dict[int, Tensor]:
    """Return for every frontier node the samples of its rows, as shapes alone suggest."""
    return {p: in_order(length, samples) for p, at in frontier.nodes.items() for _, length in _first(at)}


def proved_rows(walk: Walk, frontier: Frontier, seeds: Seeds) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Return for every frontier node the samples of its rows, and for those where it cannot be told the reason.

    A node that no gradient came to, or whose rows had none, is taken as its shape suggests.
    """
    places = [place for place, at in frontier.nodes.items() if at and at[0] is not None]
    points = [Point(walk.nodes[p], _Squares(at[0][0])) for p in places if (at := frontier.nodes[p])[0] is not None]
    dtypes = {data.dtype for node in walk.nodes for data in node._input_metadata}
    half = bool(dtypes & {torch.float16, torch.bfloat16})
    found = row_ids(
        seeds,
        points,
        bits=BITS_OF_FLOAT16 if torch.float16 in dtypes else BITS,
        tolerance=6e-2 if half else _TOLERANCE[torch.float64 if dtypes == {torch.float64} else torch.float32],
        foreign=[node for node in walk.nodes if is_foreign(node)],
    )
    whose, wrong = rows_by_shape(frontier, seeds.size), dict[int, str]()
    for place, rows in zip(places, found, strict=True):
        if rows is None:
            continue
        known = rows.ids >= 0
        turns = torch.arange(len(rows.ids), device="cpu") % seeds.size
        order = [o for o in (whose[place], turns) if torch.equal(o[known], rows.ids[known])]
        if bool((rows.ids == MIXED).any()):
            wrong[place] = _MIXES
        elif order:
            whose[place] = order[0]
        else:
            wrong[place] = _ORDER
    return whose, wrong


def _first(at: tuple[tuple[int, int] | None, ...]) -> list[tuple[int, int]]:
    return [each for each in at if each is not None][:1]


class _Squares:
    """Function that takes a gradient to the squared norms of its rows along a dimension."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __call__(self, gradient: Any) -> Tensor:
        rows: Tensor = gradient.movedim(self._dim, 0).reshape(gradient.shape[self._dim], -1)
        return rows.double().square().sum(1)
