"""Questions to the graph of one forward pass."""

from __future__ import annotations

from typing import Any

from lipcore.models.outputs import nodes_before


def goes_past(output: Any, source: Any, layer: Any) -> bool:
    """Return whether the output's node depends on the source's by a way that does not lead through the layer's."""
    return any(node is source for node in nodes_before([output], (layer,)))
