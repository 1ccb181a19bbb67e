"""Graphs that allow the training's backward pass alone, and the wrappers' nodes in a graph."""

from __future__ import annotations

from typing import Any

from lipcore.capture.checkpoints import is_reentrant_checkpoint
from lipcore.capture.foreign_functions import function_of
from lipcore.models.torch_internals import gives_once

REENTRANT = "a checkpoint with use_reentrant=True allows no other backward pass; use use_reentrant=False"
GIVES_ONCE = "{0} may give what it keeps to one backward pass alone"
STATIC = "the first pass of DistributedDataParallel(static_graph=True) allows no other backward pass"


def is_ddp_sink(node: Any) -> bool:
    """Return whether a node of the graph is the identity that DistributedDataParallel puts on outputs."""
    function = function_of(node)
    return function is not None and function.__name__ == "_DDPSink"


def why_once_only(node: Any) -> str:
    """Return why the graph of this node allows no other backward pass, or ""."""
    if is_reentrant_checkpoint(node):
        return REENTRANT
    once = gives_once(node)
    if once:
        return GIVES_ONCE.format(once)
    return STATIC if is_ddp_sink(node) and node.ddp_weakref().static_graph else ""
