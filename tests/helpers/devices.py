"""The device of the GPU tests: a real one, or the emulated one, which works through a few million elements a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import pytest
import torch
from emulated_core import emulator
from torch import Tensor

EMULATED = emulator is not None
T = TypeVar("T")


def sized(on_a_gpu: T, emulated: T) -> T:
    """Return the sizes for the device at hand."""
    return emulated if EMULATED else on_a_gpu


_FAST_IN_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def set_capability(capability: int) -> None:
    """Give the emulated device this one, major * 10 + minor, for the rest of a test; skip where a real one differs."""
    if emulator is not None:
        emulator.set_capability(capability)
    elif torch.cuda.get_device_capability() != divmod(capability, 10):
        pytest.skip("of another device")


def slow_in_float64() -> bool:
    """Return whether the device takes 16 or more times as long in float64 as in float32."""
    capability = torch.cuda.get_device_capability() if emulator is None else divmod(emulator.capability(), 10)
    return capability not in _FAST_IN_FLOAT64


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise an error where the host waits for the device within the with block."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def placed_as_it_is(x: Tensor | None) -> Tensor | None:
    """Return a copy on the device with the strides and the offset that x has."""
    if x is None:
        return None
    x = x.detach().resolve_neg()
    memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    there = memory.to(torch.device("cuda", torch.cuda.current_device()), copy=True)
    return there.as_strided(x.shape, x.stride(), x.storage_offset())
