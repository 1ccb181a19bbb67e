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

OTHER = "no pass that does as many operations was proved yet"
OTHER_REGIONS = (
    "no pass that ran these compiled regions was proved yet (torch.compile has compiled anew: for other sizes, for a "
    "flag that has changed)"
)
OTHER_ORDER = "no pass that puts its samples into this order was proved yet"


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

    def news(self, kind: tuple[int, ...], order: Order, *, shape_is_known: bool) -> str:
        """Return what no pass of a kind has had that was proved, or "". An input of another shape may take other
        operations (a loop over the positions), of whose order nothing is known then."""
        known = self._known.get(kind)
        if known is None or order in known:
            return ""
        if all(order.operations != each.operations for each in known):
            return OTHER if shape_is_known else ""
        told, self.vary = self.vary, True
        return "" if told else OTHER_ORDER


def order_of(output: Any, samples: int) -> Order:
    """Return the order in a pass that has returned this."""
    walk = Walk(output)
    return Order(hash(walk.signature()), hash((tuple(walk.numbers), tuple(_parts(walk, samples)))))


def joins(node: Any, samples: int) -> bool:
    """Return whether a node puts rows together to as many as samples, or to as many for each: what it is given, and in
    which order, may be another in every pass."""
    name: str = node.name()
    if not name.startswith(_JOINS):
        return False
    shape = shapes(node)[0]
    dims = saved(node, "dims") if name.startswith("Roll") else (saved(node, "dim"),)
    at = {integer(dim) % len(shape) for dim in dims or range(len(shape))} if shape else set()
    return any(shape[dim] == samples or (dim == 0 and shape[dim] % samples == 0) for dim in at)


def _writes_samples(node: Any, samples: int) -> bool:
    """Return whether a node writes some of its samples' rows into a tensor of all of them."""
    if not node.name().endswith("CopySlices") or samples < 2:
        return False
    into = shapes(node)[0]
    if samples not in into and (not into or into[0] % samples):
        return False
    written = [shapes(child)[number] for child, number in node.next_functions[1:] if child is not None]
    return any(_is_part(math.prod(into), math.prod(shape), samples) and samples not in shape for shape in written)


def _is_part(whole: int, part: int, samples: int) -> bool:
    """Return whether a number of elements is that of some samples, out of the number of all of them."""
    return 0 < part < whole and part * samples % whole == 0


def _parts(walk: Walk, samples: int) -> Iterator[tuple[Any, ...]]:
    """Yield, of the nodes that take some of their samples, which."""
    for place, node in enumerate(walk.nodes):
        name: str = node.name()
        if name.startswith("RollBackward"):
            yield place, tuple(saved(node, "dims")), tuple(saved(node, "shifts"))
        elif name.startswith("FlipBackward"):
            yield place, tuple(saved(node, "dims"))
        elif name in _PARTS:
            shape = saved(node, "self_sym_sizes")
            dim = integer(saved(node, "dim")) % len(shape)
            if 1 < shape[dim] <= samples:  # others are no samples: how long each of them is, say
                which = saved(node, _PARTS[name])
                yield place, dim, which if isinstance(which, int) else tuple(which)
