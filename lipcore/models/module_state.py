"""What a forward pass may change in a model and in the process, kept at one moment and put back."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class ModuleState:
    """Random numbers, buffers and attributes of modules as they are at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module.__dict__, _copied(module.__dict__)) for module in model.modules()]
        self._inside = [
            (value, _copied(value))
            for owner, _ in self._attributes
            for key, value in owner.items()
            if isinstance(value, (dict, list, set, deque)) and "_hooks" not in key
        ]
        own = [
            v for owner, _ in self._attributes for v in owner.values() if isinstance(v, Tensor) and v.grad_fn is None
        ]
        self._tensors = [(t, t.detach().clone()) for t in (*model.buffers(), *own)]
        devices = {t.device for tensors in (model.parameters(), model.buffers()) for t in tensors if t.is_cuda}
        self._cpu, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def random_states(self) -> list[Tensor]:
        """Return what torch's generators are at now, as this knows them."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]

    def put_back(self) -> None:
        """Make everything what it was then."""
        for owner, kept in (*self._attributes, *self._inside):
            _restore(owner, kept)
        for tensor, value in self._tensors:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)  # without a new version, which a graph of the user's would refuse
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


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
