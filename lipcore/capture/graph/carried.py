"""The frontier moved towards the parameters again, in passes whose model chooses rows (experts): whose they are is
carried there from where it is known, through the index tensors of the pass itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lipcore.capture.graph.edge_ids import ids_behind
from lipcore.capture.graph.frontier import Frontier
from lipcore.capture.graph.ids_step import NOBODY, Step, merged, narrowed
from lipcore.capture.graph.walk import Walk


class Rows(NamedTuple):
    """The rows at the outputs of a node.

    Attributes:
        dims: by output, where they are.
        whose: the sample of each, int64 on the CPU; NOBODY where no gradient comes to it.
    """

    dims: tuple[int | None, ...]
    whose: Tensor


class Carried(NamedTuple):
    """A frontier nearer to the parameters, and the samples of the rows at its nodes that are not in the other one."""

    frontier: Frontier
    whose: dict[int, Tensor]


def carried(
    walk: Walk, frontier: Frontier, whose: Mapping[int, Tensor], known: Collection[int], may: Callable[[int], bool]
) -> Carried:
    """Carry the samples of rows from the frontier on, as far as they can be told.

    Args:
        walk: the graph of the pass, on whose tensors are no hooks.
        frontier: where rows are in the order of the batch.
        whose: per node there, the samples of its rows.
        known: the nodes there to carry from.
        may: asked whether a place with rows may be at the new frontier.
    """
    order = _from_the_frontier(walk, frontier)
    start = {place: _ids_at(walk, frontier.nodes[place], place, whose[place]) for place in known if place in whose}
    stopped = set[int]()
    while True:
        ids = _ids(walk, frontier, order, start, stopped)
        inner = {p for p in ids if p in frontier.free}
        free = frontier.free - inner
        nodes = {p for p in (*frontier.nodes, *inner) if not free.isdisjoint(walk.next[p])}
        rows = {p: _rows(ids[p], walk, p) for p in nodes & inner}
        bad = {p for p, each in rows.items() if each is None or (len(each.whose) and not may(p))}
        if not bad:
            break
        stopped |= bad
    found = {p: each for p, each in rows.items() if each is not None}
    at = {p: found[p].dims if p in found else frontier.nodes[p] for p in sorted(nodes)}
    behind = {name: places - inner for name, places in frontier.behind.items()}
    return Carried(replace(frontier, nodes=at, free=free, behind=behind), {p: each.whose for p, each in found.items()})


def _from_the_frontier(walk: Walk, frontier: Frontier) -> list[int]:
    """Return the places at and behind a frontier, each after all that bring a gradient to it."""
    places = frontier.free | frontier.nodes.keys()
    open_edges = Counter(child for place in places for child in walk.next[place] if child in frontier.free)
    todo, order = [place for place in places if not open_edges[place]], list[int]()
    while todo:
        place = todo.pop()
        order.append(place)
        for child in walk.next[place]:
            if child in frontier.free:
                open_edges[child] -= 1
                if not open_edges[child]:
                    todo.append(child)
    return order


def _ids(
    walk: Walk,
    frontier: Frontier,
    order: list[int],
    start: Mapping[int, list[Tensor | None]],
    stopped: Collection[int],
) -> dict[int, list[Tensor | None]]:
    """Return, by place, the ids of the gradients at the outputs of the nodes where they can be told."""
    ids = dict(start)
    came: dict[int, dict[int, Tensor | None]] = {}
    for place in order:
        if place in frontier.free:
            each = came.pop(place, {})
            if place in frontier.leaves or place in stopped or not each or any(v is None for v in each.values()):
                here = None
            else:
                here = [each.get(k) for k in range(len(walk.shapes(place)))]
                here = _with_its_own(here) if place in walk.roots else here
                if here is not None:
                    ids[place] = here
        else:
            here = ids.get(place)
        edges = [(i, c) for i, c in enumerate(walk.next[place]) if c in frontier.free and c not in frontier.leaves]
        if not edges:
            continue
        node, outs, others = walk.nodes[place], walk.shapes(place), _shapes_behind(walk, place)
        for i, child in edges:
            number, shape = walk.numbers[place][i], others[i]
            found = None
            if here is not None and shape is not None:
                found = ids_behind(Step(node, i, here, outs, shape, others))
            before = came.setdefault(child, {})
            before[number] = merged(before[number], found) if number in before else found
    return ids


def _with_its_own(ids: list[Tensor | None]) -> list[Tensor | None] | None:
    """Return the ids at what the model returns too: a loss may bring a gradient to rows that get none from inside. None
    where it cannot be told of which sample these are."""
    all_rows = [None if each is None else narrowed(each) for each in ids]
    return None if any(each is not None and bool((each == NOBODY).any()) for each in all_rows) else all_rows


def _shapes_behind(walk: Walk, place: int) -> list[tuple[int, ...] | None]:
    behind = zip(walk.next[place], walk.numbers[place], strict=True)
    return [None if child < 0 else walk.shapes(child)[number] for child, number in behind]


def _ids_at(walk: Walk, dims: tuple[int | None, ...], place: int, whose: Tensor) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for dim, shape in zip(dims, walk.shapes(place), strict=True):
        found.append(None if dim is None else whose.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
    return found


def _rows(ids: list[Tensor | None], walk: Walk, place: int) -> Rows | None:
    """Return ids as those of rows along one dimension; None where they are not."""
    dims: list[int | None] = []
    whose: Tensor | None = None
    for each, shape in zip(ids, walk.shapes(place), strict=True):
        if each is None:
            dims.append(None)
            continue
        varies = [d for d, size in enumerate(each.shape) if size > 1]
        if len(varies) > 1:
            each = narrowed(each)
            varies = [d for d, size in enumerate(each.shape) if size > 1]
        if len(varies) > 1 or not shape:
            return None
        dim = varies[0] if varies else 0
        rows = each.flatten().expand(shape[dim])
        if whose is not None and not torch.equal(whose, rows):
            return None
        whose = rows
        dims.append(dim)
    return None if whose is None else Rows(tuple(dims), whose.contiguous())
