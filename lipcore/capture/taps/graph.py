"""Questions to the graph of one forward pass."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from lipcore.models.outputs import nodes_before

_OF_SHARDING = "RegisterPostBackwardFunctionBackward"  # what fully_shard() puts on all inputs that require gradients

#: Names of operations, which of their inputs depend on parameters or other leaves, and how often each is there.
Operations = frozenset[tuple[tuple[str, tuple[bool, ...]], int]]
Edges = tuple[tuple[Any, int], ...]


def goes_past(output: Any, source: Any, layer: Any) -> bool:
    """Return whether the output's node depends on the source's by a way that does not lead through the layer's."""
    return any(node is source for node in nodes_before([output], (layer,)))


def operations_of(output: Any, without: Collection[Any] = ()) -> Operations:
    """Return the operations with several inputs that a graph is made of behind a node: another way to the output begins
    at one of these. What has one input leads nowhere else, and may be there twice in a pass that does the same (casts,
    which autocast keeps). Nodes that lipcore's hooks have put in are left out.

    Args:
        without: nodes of leaves that do not count, nor do operations that depend on them alone.
    """
    return _but(output, without) if without else _all(output)


def _all(output: Any) -> Operations:
    """Return them where all leaves count. Asked in every pass, of thousands of nodes, so each is asked for its inputs
    once, its type for the rest, and leaves, a third of them, for nothing."""
    seen: set[Any] = set()
    found: dict[tuple[str, tuple[bool, ...]], int] = {}
    kinds, ends, node, todo = _kinds, _ends, output, [None]
    while todo:
        while type(node) not in ends and node not in seen:
            seen.add(node)
            edges = node.next_functions
            if len(edges) == 1:
                node = edges[0][0]
                continue
            name, counts, is_leaf, is_own = kinds.get(type(node)) or _kind_of(node)
            todo += [edge[0] for edge in edges]
            if counts and edges:
                key = name or node.name(), tuple([edge[0] is not None for edge in edges])
                found[key] = found.get(key, 0) + 1
            elif (is_own and not any(_is_of_model(edge[0]) for edge in edges)) or not (edges or is_leaf):
                return _but(output, ())  # gradients begin there, of which none is a parameter's
            break
        node = todo.pop()
    return frozenset(found.items())


def _but(output: Any, without: Collection[Any]) -> Operations:
    """Return them where some leaves do not count."""
    depends: dict[Any, bool] = {None: False} | dict.fromkeys(without, False)
    inputs: dict[Any, Edges] = {}
    found: dict[tuple[str, tuple[bool, ...]], int] = {}
    todo = [output]
    while todo:
        node = todo[-1]
        if node in depends:
            todo.pop()
            continue
        edges = inputs.get(node)
        if edges is None:
            edges = inputs[node] = node.next_functions
            todo += [edge[0] for edge in edges if edge[0] not in depends]
            continue
        kind = _kinds.get(type(node)) or _kind_of(node)
        if len(edges) < 2:
            depends[node] = depends[edges[0][0]] if edges else kind.is_leaf
            continue
        which = tuple([depends[each] and (not kind.is_own or _is_of_model(each)) for each, _ in edges])
        depends[node] = any(which)
        if kind.counts and depends[node]:
            key = kind.name or node.name(), which
            found[key] = found.get(key, 0) + 1
    return frozenset(found.items())


def _is_of_model(node: Any) -> bool:
    """Return whether an input of one of lipcore's nodes is the model's: leaves there are lipcore's own."""
    return node is not None and not hasattr(node, "variable")


class _Kind(NamedTuple):
    """Facts about all nodes of a type."""

    name: str  #: "" where each of them has its own
    counts: bool
    is_leaf: bool
    is_own: bool


_kinds: dict[type, _Kind] = {}  # of torch's own nodes: types of Functions may come and go
_ends: set[type] = {type(None)}  # of leaves, and of no node


def _kind_of(node: Any) -> _Kind:
    function = getattr(node, "_forward_cls", None)
    own, name = str(getattr(function, "__module__", "")).split(".")[0] == "lipcore", node.name()
    kind = _Kind(
        name if name == type(node).__name__ else "", not own and name != _OF_SHARDING, hasattr(node, "variable"), own
    )
    if function is None:
        _kinds[type(node)] = kind
        _ends.update([type(node)] * kind.is_leaf)
    return kind
