"""What a pass of lipcore's own may change beside gradients, and has back when it ends: buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lipcore.models.module_state import ModuleState, same
from lipcore.models.random_numbers import RandomNumbers


class RandomPass(ValueError):
    """Warning that the model drew random numbers: what was measured is one draw of many."""


@contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    """Put back the values that buffers had, whether they are changed in place, exchanged, or changed through .data."""
    kept = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [
        (buffer, buffer._version, buffer.detach().clone())
        for _, buffers in kept
        for buffer in buffers.values()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, buffers in kept:
            owner._buffers.update(buffers)
        for buffer, version, value in values:
            if buffer._version != version or not same(buffer, value):
                buffer.data.copy_(value)  # without a new version, which a graph of the user's would refuse


@contextmanager
def module_state_put_back(model: nn.Module) -> Iterator[None]:
    """Put back buffers, attributes of the modules and what stands in them."""
    state = ModuleState(model)
    try:
        yield
    finally:
        state.put_back()


@contextmanager
def random_numbers_put_back(model: nn.Module, *, allowed: bool = False) -> Iterator[None]:
    """Put the generators that a forward pass may use back where they were.

    Raises:
        RandomPass: one of them was used, and that is not `allowed`.
    """
    numbers, used = RandomNumbers(model), False
    try:
        yield
    finally:
        used = numbers.put_back()
    if used and not allowed:
        raise RandomPass(
            "model: its forward pass draws random numbers, so its output is random; call model.eval(), or leave the "
            "noise out"
        )


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """Keep autocast from keeping weights that it casts here for the training's next forward pass: they may have no
    graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
