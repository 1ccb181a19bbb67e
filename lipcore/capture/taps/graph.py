"""Questions to the graph of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lipcore.models.outputs import nodes_before


def goes_past(output: Any, source: Any, layer: Any) -> bool:
    """Return whether the output's node depends on the source's by a way that does not lead through the layer's."""
    return any(node is source for node in nodes_before([output], (layer,)))


def reentrant_checkpoint(nodes: Iterable[Any]) -> bool:
    """Return whether part of a pass ran without a graph, to run again in the backward pass."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes)
