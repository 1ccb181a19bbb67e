"""The random numbers that a forward pass may draw: torch's, Python's and NumPy's, kept at one moment and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class RandomNumbers:
    """States of the generators at one moment: torch's on the CPU and on the model's CUDA devices, Python's, NumPy's."""

    def __init__(self, model: nn.Module) -> None:
        devices = {t.device for tensors in (model.parameters(), model.buffers()) for t in tensors if t.is_cuda}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._cpu, self._others = torch.get_rng_state(), _others()

    def now(self) -> list[Tensor]:
        """Return the states of torch's generators as they are now."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]

    def put_back(self) -> bool:
        """Put the generators back; return whether one of them had been used."""
        used = not torch.equal(self._cpu, torch.get_rng_state())
        if used:
            torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            if not torch.equal(state, torch.cuda.get_rng_state(device)):
                used = True
                torch.cuda.set_rng_state(state, device)
        if not _equal(self._others, _others()):
            used = True
            python, numpy = self._others
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
        return used


def _others() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def _equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    numpy, now = one[1], other[1]
    return bool(one[0] == other[0] and numpy[2:] == now[2:] and np.array_equal(numpy[1], now[1]))
