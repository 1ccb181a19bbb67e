"""Questions to the graph of one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from lipcore.models.outputs import nodes_before

_OF_SHARDING = "RegisterPostBackwardFunctionBackward"  # what fully_shard() puts on all inputs that require gradients

#: Names of operations, which of their inputs depend on parameters or other leaves, and how often each is there.
Operations = frozenset[tuple[tuple[str, tuple[bool, ...]], int]]


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
    depends: dict[Any, bool] = {None: False} | dict.fromkeys(without, False)
    inputs: dict[Any, list[Any]] = {}
    found: Counter[tuple[str, tuple[bool, ...]]] = Counter()
    todo = [output]
    while todo:
        node = todo[-1]
        if node in depends:
            todo.pop()
            continue
        before = inputs.get(node)
        if before is None:
            before = inputs[node] = [each for each, _ in node.next_functions]
            todo += [each for each in before if each not in depends]
            continue
        todo.pop()
        if len(before) < 2:
            depends[node] = depends[before[0]] if before else hasattr(node, "variable")
            continue
        own = _is_own(node)
        which = tuple(depends[each] and not (own and hasattr(each, "variable")) for each in before)
        depends[node] = any(which)
        if depends[node] and not own and node.name() != _OF_SHARDING:
            found[node.name(), which] += 1
    return frozenset(found.items())


def _is_own(node: Any) -> bool:
    function = getattr(node, "_forward_cls", None)
    return str(getattr(function, "__module__", "")).split(".")[0] == "lipcore"
