"""Reentrant checkpoints: parts of a pass that ran without a graph, and run again in the backward pass."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointFunction

from lipcore.capture.foreign_functions import function_of


def is_reentrant_checkpoint(node: Any) -> bool:
    """Return whether a node of the graph is a reentrant checkpoint: torch's, or one of the same name that other
    libraries make after it."""
    function = function_of(node)
    return function is not None and any(base.__name__ == CheckpointFunction.__name__ for base in function.__mro__)
