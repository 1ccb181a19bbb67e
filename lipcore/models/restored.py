"""What a pass of lipcore's own may change beside gradients, and has back when it ends: buffers and random numbers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
            if buffer._version != version or not _same(buffer, value):
                buffer.data.copy_(value)  # without a new version, which a graph of the user's would refuse


def _same(buffer: Tensor, value: Tensor) -> bool:
    return buffer.layout != torch.strided or torch.equal(buffer, value)


_PLAIN = (list, dict, set, deque)


@contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Put back the objects that attributes of the modules had, entries of lists and dicts among them, and values of
    plain tensors: a state that a model carries from pass to pass, counters, a memory."""
    modules = list(model.modules())
    kept = [(module.__dict__, dict(module.__dict__)) for module in modules]
    objects = [value for _, entries in kept for value in entries.values()]
    containers = [(value, copy.copy(value)) for value in objects if type(value) in _PLAIN]
    tensors = [value for value in objects if type(value) is Tensor and value.layout == torch.strided]
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    try:
        yield
    finally:
        for entries, before in kept:
            _refill(entries, before)
        for value, before in containers:
            _refill(value, before)
        for tensor, version, value in values:
            if tensor._version != version:
                tensor.data.copy_(value)


def _refill(container: Any, before: Any) -> None:
    if _entries(container) == _entries(before):
        return
    container.clear()
    container.extend(before) if isinstance(container, (list, deque)) else container.update(before)


def _entries(container: Any) -> Any:
    """Return entries by identity: tensors do not compare to one truth value."""
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return container if isinstance(container, set) else [id(value) for value in container]


@contextmanager
def random_numbers_put_back(model: nn.Module, *, allowed: bool = False) -> Iterator[None]:
    """Put the generators of the CPU and of the model's CUDA devices back where they were.

    Raises:
        RandomPass: one of them was used, and that is not `allowed`.
    """
    devices = {t.device for tensors in (model.parameters(), model.buffers()) for t in tensors if t.is_cuda}
    cpu, cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}
    used = False
    try:
        yield
    finally:
        if not torch.equal(cpu, torch.get_rng_state()):
            used = True
            torch.set_rng_state(cpu)
        for device, state in cuda.items():
            if not torch.equal(state, torch.cuda.get_rng_state(device)):
                used = True
                torch.cuda.set_rng_state(state, device)
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
