"""The order of rows that a view has made of several dimensions, one of them the batch's: those of one sample after
those of the one before, or samples in turns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lipcore.capture.graph.walk import VIEWS, Walk, passed, shapes

_MOST = 32  # nodes that are looked at
_KEEP = (
    *("Addmm", "Mm", "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Rsqrt", "Exp", "Log", "Tanh", "Erf"),
    *("Silu", "Gelu", "Relu", "LeakyRelu", "Elu", "Hardtanh", "Sigmoid", "Softplus", "Clamp", "Where", "MaskedFill"),
    *("NativeDropout", "Clone", "ToCopy", "Alias", "Softmax", "LogSoftmax", "NativeLayerNorm", "FusedRmsNorm"),
)


def in_turns(rows: int, mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool | None:
    """Return whether rows that a view has made of the first dimensions of a tensor are in turns; None where neither
    that nor samples one after the other.

    Args:
        rows: how many.
        mine: the tensor's shape.
        theirs: its shape on one sample more.
    """
    last = next((k for k in range(1, len(mine) + 1) if math.prod(mine[:k]) == rows), 0)
    batch = [d for d, (n, m) in enumerate(zip(mine, theirs, strict=False)) if n != m]
    if not last or len(mine) != len(theirs) or len(batch) != 1 or batch[0] >= last:
        return None
    if math.prod(mine[: batch[0]]) == 1:
        return False
    return True if math.prod(mine[batch[0] + 1 : last]) == 1 else None


def turns_of_output(node: Any, other: Any, rows: int) -> bool | None:
    """Return whether the rows of a tensor that this node has made are in turns, by the views behind it."""
    node, other = passed(node), passed(other)
    while node is not None and other is not None and node.name() in VIEWS and other.name() in VIEWS:
        node, other = passed(node.next_functions[0][0]), passed(other.next_functions[0][0])
        if node is None or other is None:
            return None
        found = in_turns(rows, shapes(node)[0], shapes(other)[0])
        if found is not None and shapes(node)[0][0] != rows:
            return found
    return None


class RowViews:
    """The views near the nodes of a graph that merge the batch's dimension with others.

    Args:
        walk: the graph.
        pairs: by place, the node in the graph on one sample more.
        parents: by place, the places of those that use it.
    """

    def __init__(self, walk: Walk, pairs: Mapping[int, Any], parents: list[list[int]]) -> None:
        self._walk, self._pairs, self._parents = walk, pairs, parents

    def in_turns(self, place: int, dim: int) -> bool | None:
        """Return whether the rows of a node's output are in turns; None where no view near it tells."""
        if dim:
            return None
        rows, seen, todo = self._walk.shapes(place)[0][0], {place}, [place]
        while todo and len(seen) < _MOST:
            near = todo.pop(0)
            behind = [(child, self._is_view(near)) for child in self._walk.next[near] if child >= 0]
            for other, tells in (*((parent, self._is_view(parent)) for parent in self._parents[near]), *behind):
                if other in seen or other not in self._pairs:
                    continue
                seen.add(other)
                mine, theirs = self._walk.shapes(other)[0], shapes(self._pairs[other])[0]
                if tells and mine and mine[0] != rows and (found := in_turns(rows, mine, theirs)) is not None:
                    return found
                name = self._walk.nodes[other].name()
                keeps = name.partition("Backward")[0] in _KEEP or name in VIEWS
                if keeps and self._walk.shapes(other)[0][:1] == (rows,):
                    todo.append(other)
        return None

    def _is_view(self, place: int) -> bool:
        return self._walk.nodes[place].name() in VIEWS
