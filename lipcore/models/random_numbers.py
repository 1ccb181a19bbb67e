"""The random numbers that a forward pass may draw, kept at one moment and put back: torch's, Python's and NumPy's, and
those of generators that the model holds."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from lipcore.models.held import Held


class _Generator(NamedTuple):
    state: Callable[[], Any]
    restore: Callable[[Any], Any]
    equal: Callable[[Any, Any], bool]


class RandomNumbers:
    """States at one moment of the generators that a forward pass may use: torch's on the CPU and on the model's CUDA
    devices, Python's, NumPy's, and the model's own."""

    def __init__(self, held: Held) -> None:
        devices = {t.device for tensors in (held.parameters(), held.buffers()) for t in tensors if t.is_cuda}
        generators = [_TORCH, _PYTHON, _NUMPY, *map(_on_device, devices), *map(_held, held.generators)]
        self._kept = [(generator, generator.state()) for generator in generators]

    def now(self) -> list[Any]:
        """Return the states as they are now."""
        return [generator.state() for generator, _ in self._kept]

    def set(self, states: list[Any]) -> None:
        """Give the generators states that they had at another moment."""
        for (generator, _), state in zip(self._kept, states, strict=True):
            generator.restore(state)

    def are_same(self, one: list[Any], other: list[Any]) -> bool:
        """Return whether the generators had the same states at two moments."""
        return all(kept[0].equal(a, b) for kept, a, b in zip(self._kept, one, other, strict=True))

    def put_back(self) -> bool:
        """Put the generators back; return whether one of them had been used."""
        used = False
        for generator, state in self._kept:
            if not generator.equal(state, generator.state()):
                used = True
                generator.restore(state)
        return used


def _on_device(device: torch.device) -> _Generator:
    return _Generator(
        lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device), torch.equal
    )


def _held(generator: Any) -> _Generator:
    if isinstance(generator, torch.Generator):
        return _Generator(generator.get_state, generator.set_state, torch.equal)
    if isinstance(generator, random.SystemRandom):
        return _Generator(lambda: None, lambda state: None, operator.is_)
    if isinstance(generator, random.Random):
        return _Generator(generator.getstate, generator.setstate, operator.eq)
    if isinstance(generator, np.random.RandomState):
        return _Generator(generator.get_state, generator.set_state, _equal)
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return _Generator(lambda: bits.state, lambda state: setattr(bits, "state", state), _equal)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two states of NumPy's are the same: dicts, tuples and arrays of numbers and words."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


_TORCH = _Generator(torch.get_rng_state, torch.set_rng_state, torch.equal)
_PYTHON = _Generator(random.getstate, random.setstate, operator.eq)
_NUMPY = _Generator(np.random.get_state, np.random.set_state, _equal)
