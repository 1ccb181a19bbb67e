"""Calls of a model inside its own forward pass (trees, two views of a batch), which are parts of the pass under way."""

from __future__ import annotations

from torch import nn

from lipcore.models.torch_internals import calls_itself


class SelfCalls:
    """Counter of such calls that are under way in one pass."""

    def __init__(self) -> None:
        self._inside = 0

    def goes_on(self, model: nn.Module) -> bool:
        """Return whether a call of the model that begins now, while the pass is under way, is one."""
        if not calls_itself(model):
            return False
        self._inside += 1
        return True

    def goes_back(self) -> bool:
        """Return whether a call of the model that ends now was one."""
        if not self._inside:
            return False
        self._inside -= 1
        return True
