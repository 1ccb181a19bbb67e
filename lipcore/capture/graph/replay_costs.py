"""What replays cost: the FLOPs of nodes that are run once more for every sample, from the shapes of their tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.graph.closed_forms import CLOSED_FORMS, SampleRows
from lipcore.capture.graph.edges import Edges
from lipcore.capture.graph.frontier import EVERYTHING, Frontier
from lipcore.capture.graph.replay import is_sum
from lipcore.capture.graph.walk import Walk, shapes
from lipcore.models.torch_internals import saved

#: By name of a product of matrices, the numbers of its edges to the left and to the right one.
_PRODUCTS = {"Mm": (0, 1), "Bmm": (0, 1), "GroupedMm": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Addbmm": (1, 2)}
_RECURRENT = ("CudnnRnn", "MkldnnRnnLayer", "MiopenRnn")
#: Names of nodes that move numbers and compute nothing.
_MOVES = frozenset(
    ("Slice", "Select", "View", "UnsafeView", "ReshapeAlias", "Alias", "Unsqueeze", "Squeeze", "T", "Transpose")
)

Shape = tuple[int, ...]


class ReplayCosts:
    """The nodes of one pass that are run once for every sample, and what that takes.

    Args:
        walk: the graph of the pass.
        frontier: what is measured in it.
        samples: B.
        whole: as of :class:`Replay`.
    """

    def __init__(self, walk: Walk, frontier: Frontier, samples: int, whole: bool) -> None:
        self._walk, self._frontier, self._samples = walk, frontier, samples
        self._edges = Edges(walk, frontier)
        self._frontier_run: dict[int, set[int]] = {}  # with the places behind, for which each is run
        self._free_run: set[int] = set()
        self._look(whole)

    def _look(self, whole: bool) -> None:
        edges, todo = self._edges, list[int]()
        for place, at in self._frontier.nodes.items():
            node = self._walk.nodes[place]
            done = _by_closed_form(node, place, at[0], edges, whole)
            left = [c for i, c in enumerate(edges.next[place]) if c in edges.shapes and i not in done]
            if not (is_sum(node.name()) and at[0] is not None):
                self._frontier_run[place] = set(left)
            todo += left
        while todo:
            place = todo.pop()
            if place not in self._free_run and place not in edges.leaves:
                self._free_run.add(place)
                todo += [c for c in edges.next[place] if c in edges.shapes]

    def __len__(self) -> int:
        """Return how many nodes are run for every sample."""
        return sum(map(bool, self._frontier_run.values())) + len(self._free_run)

    def replays(self, name: str) -> set[int]:
        """Return the places of the nodes that are run for every sample for one parameter."""
        behind = self._frontier.behind[name]
        return {p for p, left in self._frontier_run.items() if not behind.isdisjoint(left)} | (self._free_run & behind)

    def flops(self, name: str) -> int:
        """Return the FLOPs of one parameter's replays in a pass: B times those of :func:`flops_of` of each node that
        its gradient comes through; what several parameters share is counted for each. 0 where all of these only
        move numbers (the rows of a table)."""
        nodes = [self._walk.nodes[place] for place in self.replays(name)]
        if all(node.name().rstrip("012").removesuffix("Backward") in _MOVES for node in nodes):
            return 0
        return self._samples * sum(map(flops_of, nodes))


def flops_of(node: Any) -> int:
    r"""Return the FLOPs of running a node's backward once, from the shapes of what it has made, o, and of the gradients
    that it brings.

    A product of matrices, :math:`o = a b` with a [..., M, K] and b [..., K, N], takes 2MKN for each of the two, times
    the batches of matrices (a grouped product: M rows in all); a convolution two per element of the weight and position
    of its output for each of input and weight; attention 10 per query, key and feature; a fused recurrent layer 4 per
    element of the weights and row. All other gradients take one per element, and so do the elements of o.
    """
    name = node.name().partition("Backward")[0]
    made = shapes(node)
    out = made[0] if made else ()
    found = {
        i: shapes(child)[number]
        for i, (child, number) in enumerate(node.next_functions)
        if child is not None and number < len(shapes(child))
    }
    total = sum(map(math.prod, (*made, *found.values())))
    if name in _PRODUCTS and len(out) >= 2:
        left, right = _PRODUCTS[name]
        total += 2 * math.prod(found.get(left, (0,))) * out[-1]
        groups = found.get(right, (1,))[0] if name == "GroupedMm" and len(out) == 2 else 1
        total += 2 * math.prod(found.get(right, (0,))) * out[-2] // groups
    elif "Convolution" in name and len(out) > 2:
        total += 2 * len(found.keys() & {0, 1}) * _of_convolution(node, out, found)
    elif name.startswith("ScaledDotProduct") and len(out) > 2:
        keys = next((found[i][-2] for i in (1, 2) if i in found), out[-2])
        total += 10 * math.prod(out) * keys
    elif name in _RECURRENT:
        rows = math.prod(out[:-1])
        total += 4 * rows * sum(math.prod(shape) for i, shape in found.items() if i and len(shape) == 2)
    return total


def _of_convolution(node: Any, out: Shape, found: dict[int, Shape]) -> int:
    """Return the multiplications of a convolution."""
    weight, x = (found.get(i) or tuple(saved(node, name).shape) for i, name in ((1, "weight"), (0, "input")))
    positions = x if saved(node, "transposed") else out
    return math.prod(weight) * positions[0] * math.prod(positions[2:])


class _Shapes:
    """A node whose tensors are shapes without numbers, but for integers, which may choose rows."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        kept = getattr(self._node, name)
        return kept.to("meta") if isinstance(kept, Tensor) and kept.is_floating_point() else kept


def _by_closed_form(node: Any, place: int, at: int | None, edges: Edges, whole: bool) -> set[int]:
    """Return the numbers of the edges of a frontier node that a closed form measures."""
    form, behind = CLOSED_FORMS.get(node.name()), edges.direct_shapes(place)
    if form is None or not behind or at is None or at == EVERYTHING:
        return set()
    made = node._input_metadata[0]
    grad = torch.empty(tuple(map(int, made.shape)), dtype=made.dtype, device="meta")
    if grad.is_complex():
        return set()
    # Whose the rows are makes no difference here.
    rows = SampleRows(at, torch.zeros(grad.shape[at], dtype=torch.int64, device="cpu"), 1)
    found = form(_Shapes(node), grad, rows, behind)
    return {i for i in found if not whole or edges.next[place][i] in edges.leaves}
