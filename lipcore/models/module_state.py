"""What a forward pass may change in a model, kept at one moment and put back."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.models.chains import is_own


class ModuleState:
    """Attributes of modules, the entries of containers among them, buffers, and values of plain tensors, as they are at
    one moment: a state that a model carries from pass to pass, counters, a memory. So are hooks on forward passes,
    which a model may install in its first one; lipcore's own come and go as they do."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module.__dict__, _copied(module.__dict__)) for module in model.modules()]
        self._inside = [
            (value, _copied(value))
            for owner, _ in self._attributes
            for key, value in owner.items()
            if isinstance(value, (dict, list, set, deque)) and "_hooks" not in key
        ]
        self._hooks = [(h, dict(h)) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        own = [
            v for owner, _ in self._attributes for v in owner.values() if isinstance(v, Tensor) and v.grad_fn is None
        ]
        self._tensors = [(t, t.detach().clone()) for t in (*model.buffers(), *own) if not t.is_inference()]

    def put_back(self) -> None:
        """Make everything what it was then."""
        for owner, kept in (*self._attributes, *self._inside):
            _restore(owner, kept)
        for hooks, before in self._hooks:
            _restore_hooks(hooks, before)
        for tensor, value in self._tensors:
            if not same(tensor, value):
                tensor.data.copy_(value)  # without a new version, which a graph of the user's would refuse


def same(tensor: Tensor, value: Tensor) -> bool:
    """Return whether a tensor holds these values; False where it is not strided, and cannot be compared."""
    return tensor.layout == torch.strided and torch.equal(tensor, value)


def _copied(owner: Any) -> Any:
    return dict(owner) if isinstance(owner, dict) else list(owner)


def _restore(owner: Any, kept: Any) -> None:
    if isinstance(owner, dict):
        if len(owner) != len(kept) or any(owner.get(key, owner) is not value for key, value in kept.items()):
            owner.clear()
            owner.update(kept)
    elif len(owner) != len(kept) or any(a is not b for a, b in zip(owner, kept, strict=True)):
        owner.clear()
        (owner.update if isinstance(owner, set) else owner.extend)(kept)


def _restore_hooks(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    mine = {number: hook for number, hook in hooks.items() if is_own(hook)}
    others = {number: hook for number, hook in before.items() if not is_own(hook)}
    if hooks.keys() - mine.keys() != others.keys():
        ordered = {number: hook for number, hook in before.items() if number in mine or number in others}
        hooks.clear()
        hooks.update(ordered | mine)
