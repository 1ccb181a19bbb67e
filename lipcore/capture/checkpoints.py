"""Checkpoints: parts of a pass that run again in the backward pass."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointFunction

from lipcore.capture.foreign_functions import function_of, is_foreign
from lipcore.models.torch_internals import keeps_by_hooks


def is_reentrant_checkpoint(node: Any) -> bool:
    """Return whether a node of the graph is a reentrant checkpoint: torch's, or one of the same name that other
    libraries make after it."""
    function = function_of(node)
    return function is not None and any(base.__name__ == CheckpointFunction.__name__ for base in function.__mro__)


def runs_forward(node: Any) -> bool:
    """Return whether a node of the graph may run code of a forward pass when a backward pass comes to it: that of a
    checkpoint, or of an autograd Function of others, such as the layers of a reversible network."""
    return is_reentrant_checkpoint(node) or is_foreign(node) or keeps_by_hooks(node)
