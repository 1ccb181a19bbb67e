"""The edges of a pass's graph from the frontier to the leaves, without the nodes, which would keep the graph alive."""

from __future__ import annotations

from collections import Counter

from lipcore.capture.graph.closed_forms import keeps_norms
from lipcore.capture.graph.frontier import Frontier
from lipcore.capture.graph.walk import Walk, shapes


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
        self.numbers = {p: [nr for _, nr in walk.nodes[p].next_functions] for p in self.next}
        self.shapes = {p: shapes(walk.nodes[p]) for p in frontier.free}
        self.uses = Counter(c for behind in self.next.values() for c in behind if c in self.shapes)
        self.direct = {c: n for p in frontier.nodes for c in walk.next[p] if (n := self._name_behind(c, walk))}

    def _name_behind(self, place: int, walk: Walk) -> str:
        """Return the parameter whose gradient has the norm of the one at a free node, or ""."""
        while self.uses.get(place) == 1 and place not in self.leaves:
            behind = [c for c in self.next[place] if c in self.shapes]
            if len(behind) != 1 or not keeps_norms(walk.nodes[place], self.shapes[place], self.shapes[behind[0]]):
                return ""
            place = behind[0]
        return self.leaves.get(place, "") if self.uses.get(place) == 1 else ""

    def direct_shapes(self, place: int) -> dict[int, tuple[int, ...]]:
        """Return the shapes of what is directly behind a frontier node, by number of the edge."""
        each = enumerate(zip(self.next[place], self.numbers[place], strict=True))
        return {i: self.shapes[child][number] for i, (child, number) in each if child in self.direct}
