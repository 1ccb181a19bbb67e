"""The device of the GPU tests: a real one, or the emulated one, which works through a few million elements a second."""

from __future__ import annotations

from typing import TypeVar

from emulated_core import emulator

EMULATED = emulator is not None
T = TypeVar("T")


def sized(on_a_gpu: T, emulated: T) -> T:
    """Return the sizes for the device at hand."""
    return emulated if EMULATED else on_a_gpu
