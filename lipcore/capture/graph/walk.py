"""The nodes of a pass's graph in an order that depends on its structure alone."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lipcore.capture.foreign_functions import function_of
from lipcore.capture.once_only import is_ddp_sink
from lipcore.models.outputs import nodes_before, tensors_of

#: Names of nodes of views that a reshape chooses among by strides.
VIEWS = frozenset({"ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0"})
#: In the order of the walk: the nodes' names, and where the nodes behind each are.
Signature = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]


class Walk:
    """The nodes of a graph in an order that depends on its structure alone, without lipcore's own identities.

    Attributes:
        nodes: in that order.
        roots: places of those that have made the outputs.
        next: by place, the places behind; -1 where there is nothing.
        numbers: by place, which output of each of these.
    """

    def __init__(self, output: Any) -> None:
        self.nodes: list[Any] = []
        self._places: dict[Any, int] = {}
        roots = _without_numbers([tensor for tensor in tensors_of(output) if tensor.grad_fn is not None])
        self.roots = list(dict.fromkeys(self._place(passed(node)) for node in roots))
        self.next: list[tuple[int, ...]] = []
        self.numbers: list[tuple[int, ...]] = []
        self._shapes: dict[int, tuple[tuple[int, ...], ...]] = {}
        for node in self.nodes:  # which grows
            edges = node.next_functions
            self.next.append(tuple([-1 if child is None else self._place(passed(child)) for child, _ in edges]))
            self.numbers.append(tuple([number for _, number in edges]))

    def _place(self, node: Any) -> int:
        if node is None:
            return -1
        place = self._places.setdefault(node, len(self.nodes))
        if place == len(self.nodes):
            self.nodes.append(node)
        return place

    def shapes(self, place: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of what the node at a place has made."""
        if place not in self._shapes:
            self._shapes[place] = shapes(self.nodes[place])
        return self._shapes[place]

    @property
    def aliased(self) -> frozenset[int]:
        """The ids of inputs that have a gradient by a metric's wish alone, as Lipschitz gives an alias of them, and of
        the nodes of these."""
        found = set[int]()
        for node, places in zip(self.nodes, self.next, strict=True):
            for (child, _), place in zip(node.next_functions, places, strict=True):
                while place < 0 and child is not None:  # identities, of which the alias is the last
                    if hasattr(child, "given"):
                        found |= {id(child), id(child.given())}
                    child = child.next_functions[0][0]
        return frozenset(found - {id(None)})

    def behind(self, places: Iterable[int], stop: Container[int] = ()) -> set[int]:
        """Return these places and those behind them, but for those behind the ones to stop at."""
        todo = [place for place in places if place >= 0]
        found = set(todo)
        while todo:
            place = todo.pop()
            for child in self.next[place] if place not in stop else ():
                if child >= 0 and child not in found:
                    found.add(child)
                    todo.append(child)
        return found

    def signature(self) -> Signature:
        """Return what two graphs have in common that are the same but for the sizes of tensors."""
        return tuple([node.name() for node in self.nodes]), tuple(self.next)

    def parameters(self, names: Mapping[int, str]) -> dict[int, str]:
        """Return the places of the leaves whose tensors' ids have names."""
        found = {}
        for place, behind in enumerate(self.next):
            leaf = None if behind else getattr(self.nodes[place], "variable", None)
            if leaf is not None and id(leaf) in names:
                found[place] = names[id(leaf)]
        return found


def _without_numbers(outputs: Sequence[Tensor]) -> list[Any]:
    """Return the nodes that have made the outputs, without those of numbers (losses) that are made of the others and of
    no parameter beside: a loss that is added up sample by sample has another graph for one sample more."""
    ends = {tensor.grad_fn for tensor in outputs if tensor.dim()}
    numbers = {tensor.grad_fn for tensor in outputs if not tensor.dim()} - ends if ends else set()
    spare = {n for n in numbers if not any(hasattr(node, "variable") for node in nodes_before([n], ends))}
    return [tensor.grad_fn for tensor in outputs if tensor.grad_fn not in spare]


def is_identity(function: type) -> bool:
    """Return whether an autograd Function is lipcore's and passes its first argument on."""
    return function.__module__.startswith("lipcore.") and not getattr(function, "makes_another", False)


def passed(node: Any) -> Any:
    """Return the first node at or behind this one that is no identity: lipcore's, or DistributedDataParallel's."""
    while node is not None:
        function = function_of(node)
        if function is None or not (is_identity(function) or is_ddp_sink(node)):
            break
        node = node.next_functions[0][0]
    return node


def shapes(node: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what a node has made; of a leaf its own."""
    leaf = getattr(node, "variable", None)
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape),)
    return tuple([tuple(data.shape) for data in node._input_metadata])
