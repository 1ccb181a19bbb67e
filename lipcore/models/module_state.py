"""What a forward pass may change in a model, kept at one moment and put back."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from torch import Tensor

from lipcore.models.chains import is_own
from lipcore.models.containers import attributes_of
from lipcore.models.held import Held
from lipcore.models.writes import Kept


class ModuleState:
    """Attributes of modules and of what they hold, the entries of containers, buffers, and values of plain tensors
    that are attributes, as they are at one moment: a state that a model carries from pass to pass, counters, a memory.
    So are hooks on forward passes, which a model may install in its first one; lipcore's own come and go as they do."""

    def __init__(self, held: Held) -> None:
        modules = [] if held.sharded else held.modules
        # TorchScript's modules keep theirs in C++.
        inside = [d for m in modules for d in (m._parameters, m._buffers, m._modules) if isinstance(d, dict)]
        owners = [m.__dict__ for m in modules]
        self._entries = [(owner, copied(owner)) for owner in (*owners, *inside, *held.containers)]
        self._objects = [(value, attributes_of(value)) for value in held.objects]
        self._arrays = [(value, copy(value)) for value in held.arrays]
        self._hooks = [(h, dict(h)) for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        own = [v for owner in owners for v in owner.values() if isinstance(v, Tensor) and v.grad_fn is None]
        self._tensors = [Kept(t) for t in (*held.buffers(), *own) if not t.is_inference()]

    def put_back(self) -> None:
        """Make everything what it was then."""
        for owner, kept in self._entries:
            restore(owner, kept)
        for value, attributes in self._objects:
            _restore_attributes(value, attributes)
        for array, numbers in self._arrays:
            array[... if isinstance(array, np.ndarray) else slice(None)] = numbers
        for hooks, before in self._hooks:
            _restore_hooks(hooks, before)
        for tensor in self._tensors:
            tensor.put_back()


def copied(owner: Any) -> Any:
    """Return the entries of a container that can change."""
    return dict(owner) if isinstance(owner, dict) else list(owner)


def restore(owner: Any, kept: Any) -> None:
    """Give a container the entries that it had, where they are others now."""
    if isinstance(owner, dict):
        if len(owner) != len(kept) or any(owner.get(key, owner) is not value for key, value in kept.items()):
            owner.clear()
            owner.update(kept)
    elif len(owner) != len(kept) or any(a is not b for a, b in zip(owner, kept, strict=True)):
        owner.clear()
        (owner.update if isinstance(owner, set) else owner.extend)(kept)


def _restore_attributes(value: Any, kept: dict[str, Any]) -> None:
    now = attributes_of(value)
    for name in now.keys() - kept.keys():
        object.__delattr__(value, name)
    for name, attribute in kept.items():
        if now.get(name, now) is not attribute:
            object.__setattr__(value, name, attribute)


def _restore_hooks(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    mine = {number: hook for number, hook in hooks.items() if is_own(hook)}
    others = {number: hook for number, hook in before.items() if not is_own(hook)}
    if hooks.keys() - mine.keys() != others.keys():
        ordered = {number: hook for number, hook in before.items() if number in mine or number in others}
        hooks.clear()
        hooks.update(ordered | mine)
