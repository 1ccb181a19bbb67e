"""The edges of a pass's graph from the frontier to the leaves, without the nodes, which would keep the graph alive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lipcore.capture.graph.closed_forms import keeps_norms
from lipcore.capture.graph.frontier import Frontier
from lipcore.capture.graph.ids_step import integer
from lipcore.capture.graph.walk import Walk
from lipcore.models.torch_internals import saved


class Edges:
    """Places behind the nodes at the frontier and behind those without the batch.

    Args:
        walk: the graph of the pass.
        frontier: what is measured in it.

    Attributes:
        leaves: by place of a leaf, the parameter's name.
        next: by place, the places behind a node.
        numbers: by place, which output of each node behind it.
        shapes: by free place, those of its outputs.
        uses: by free place, how many edges come to it.
        direct: by free place behind a frontier node, the parameter whose gradient has the norm of the one there.
    """

    def __init__(self, walk: Walk, frontier: Frontier) -> None:
        self.leaves = frontier.leaves
        self.next = {p: walk.next[p] for p in (*frontier.nodes, *frontier.free)}
        self.numbers = {p: walk.numbers[p] for p in self.next}
        self.shapes = {p: walk.shapes(p) for p in frontier.free}
        self.uses = Counter(c for behind in self.next.values() for c in behind if c in self.shapes)
        self._apart, self._returned = self._leaves_apart(walk), frontier.returned
        self.direct = {c: n for p in frontier.nodes for c in walk.next[p] if (n := self._name_behind(c, walk))}

    def _name_behind(self, place: int, walk: Walk) -> str:
        """Return the parameter whose gradient has the norm of the one at a free node, or ""."""
        while self.uses.get(place) == 1 and place not in self.leaves and place not in self._returned:
            behind = [c for c in self.next[place] if c in self.shapes]
            if len(behind) == 1 and behind[0] in self._apart:
                return self.leaves[behind[0]]
            if len(behind) != 1 or not keeps_norms(walk.nodes[place], self.shapes[place], self.shapes[behind[0]]):
                return ""
            place = behind[0]
        if place in self._returned:  # where all that comes is added up, and compared
            return ""
        return self.leaves.get(place, "") if self.uses.get(place) == 1 else ""

    def _leaves_apart(self, walk: Walk) -> set[int]:
        """Return the leaves that are used in parts alone, each part once (an expert's matrix of all of them): what
        comes to the parts adds up to the leaf's squared norm."""
        parts: dict[int, list[tuple[int, int] | None]] = {}
        for place, behind in self.next.items():
            for child in behind:
                if child in self.leaves:
                    parts.setdefault(child, []).append(_part(walk.nodes[place], self.shapes[child][0]))
        return {p for p, taken in parts.items() if None not in taken and _differ(taken)}

    def direct_shapes(self, place: int) -> dict[int, tuple[int, ...]]:
        """Return the shapes of what is directly behind a frontier node, by number of the edge."""
        each = enumerate(zip(self.next[place], self.numbers[place], strict=True))
        return {i: self.shapes[child][number] for i, (child, number) in each if child in self.direct}


def _part(node: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the dimension and the place along it where a node takes a part of a tensor of this shape."""
    if node.name() != "SelectBackward0":
        return None
    dim, index = (integer(saved(node, name)) for name in ("dim", "index"))
    dim %= len(shape)
    return dim, index % shape[dim]


def _differ(parts: Sequence[tuple[int, int] | None]) -> bool:
    return len({part[0] for part in parts if part}) == 1 and len(set(parts)) == len(parts)
