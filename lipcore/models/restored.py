"""What a pass of lipcore's own may change beside gradients, and has back when it ends: buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def random_numbers_put_back(model: nn.Module) -> Iterator[None]:
    """Put the generators of the CPU and of the model's CUDA devices back where they were.

    Raises:
        RandomPass: one of them was used.
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
    if used:
        raise RandomPass(
            "model: its forward pass draws random numbers, so its output is random; call model.eval(), or leave the "
            "noise out"
        )
