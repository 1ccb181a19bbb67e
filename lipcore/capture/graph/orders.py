"""The order in which a model puts samples together again that it has taken apart, where the edges of its graph say it
and not the values of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from lipcore.capture.graph.ids_step import integer
from lipcore.capture.graph.walk import Walk, shapes
from lipcore.models.outputs import nodes_of
from lipcore.models.torch_internals import saved

_JOINS = ("StackBackward", "CatBackward", "RollBackward")
#: Of nodes that take a part of their input: what says which.
_PARTS = {"SelectBackward0": "index", "SliceBackward0": "start", "SplitWithSizesBackward0": "split_sizes"}
WRITES = (
    "the model writes the rows of its samples one after the other into a tensor (out[i] = ...), and its graph does not "
    "show where; torch.stack() and index_copy() do"
)


class Order(NamedTuple):
    """Two numbers of one pass, which are others where it has done something else: of its operations, and of the samples
    that these were given."""

    operations: int
    samples: int


class Orders:
    """The orders in the passes of one model that were proved.

    Attributes:
        chosen: a pass that was proved has put samples together again.
        vary: another pass has put them into another order by the same operations.
        writes: a pass that was proved has written samples into places that its graph does not show.
    """

    def __init__(self) -> None:
        self.chosen = self.vary = self.writes = False
        self._known: dict[tuple[int, ...], set[Order]] = {}

    def look(self, output: Any, samples: int) -> None:
        """Look at what a pass has returned that is to be proved."""
        nodes = list(nodes_of(output))
        self.chosen = self.chosen or any(joins(node, samples) for node in nodes)
        self.writes = self.writes or any(_writes_samples(node, samples) for node in nodes)

    def add(self, kind: tuple[int, ...], order: Order) -> None:
        """Take in the order of a pass of a kind that was proved."""
        self._known.setdefault(kind, set()).add(order)

    def is_new(self, kind: tuple[int, ...], order: Order) -> bool:
        """Return whether no pass of a kind with this order was proved, where some were."""
        known = self._known.get(kind)
        if known is None or order in known:
            return False
        alike = any(order.operations == each.operations for each in known)
        new = not (alike and self.vary)
        self.vary = self.vary or alike
        return new


def order_of(output: Any, samples: int) -> Order:
    """Return the order in a pass that has returned this."""
    walk = Walk(output)
    return Order(hash(walk.signature()), hash((tuple(walk.numbers), tuple(_parts(walk, samples)))))


def joins(node: Any, samples: int) -> bool:
    """Return whether a node puts rows together to as many as samples: what it is given, and in which order, may be
    another in every pass."""
    name: str = node.name()
    if not name.startswith(_JOINS):
        return False
    shape = shapes(node)[0]
    dims = saved(node, "dims") if name.startswith("Roll") else (saved(node, "dim"),)
    return any(shape[integer(dim) % len(shape)] == samples for dim in dims or range(len(shape)))


def _writes_samples(node: Any, samples: int) -> bool:
    """Return whether a node writes fewer rows than there are samples into a tensor of as many."""
    if not node.name().endswith("CopySlices"):
        return False
    into = shapes(node)[0]
    if into[:1] != (samples,) or samples < 2:
        return False
    written = [shapes(child)[number] for child, number in node.next_functions[1:] if child is not None]
    return any(shape[:1] != into[:1] and 1 < math.prod(shape) * 2 <= math.prod(into) for shape in written)


def _parts(walk: Walk, samples: int) -> Iterator[tuple[Any, ...]]:
    """Yield, of the nodes that take some of their samples, which."""
    for place, node in enumerate(walk.nodes):
        name: str = node.name()
        if name.startswith("RollBackward"):
            yield place, tuple(saved(node, "dims")), tuple(saved(node, "shifts"))
        elif name in _PARTS:
            shape = saved(node, "self_sym_sizes")
            dim = integer(saved(node, "dim")) % len(shape)
            if 1 < shape[dim] <= samples:  # others are no samples: how long each of them is, say
                which = saved(node, _PARTS[name])
                yield place, dim, which if isinstance(which, int) else tuple(which)
