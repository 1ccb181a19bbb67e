"""Questions to the graph of one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any


def nodes_before(node: Any, without: Collection[Any] = ()) -> Iterator[Any]:
    """Return a node and all nodes behind it, without those in `without` and those that are behind them only."""
    seen = {node, None, *without}
    todo = [node] if node is not None and node not in without else []
    while todo:
        node = todo.pop()
        yield node
        for before, _ in node.next_functions:
            if before not in seen:
                seen.add(before)
                todo.append(before)


def goes_past(output: Any, source: Any, layer: Any) -> bool:
    """Return whether the output's node depends on the source's by a way that does not lead through the layer's."""
    return any(node is source for node in nodes_before(output, (layer,)))


def reentrant_checkpoint(nodes: Iterable[Any]) -> bool:
    """Return whether part of a pass ran without a graph, to run again in the backward pass."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes)
