"""What metrics have on a device, brought to the host together when a window is described."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class OnDevice(Protocol):
    """Something on a device that the host is to know."""

    @property
    def device(self) -> torch.device:
        """The device."""

    @property
    def is_changed(self) -> bool:
        """True when there may be something that the host does not know."""

    def packed(self) -> Tensor:
        """Return it as one row of int64 on the device, without waiting."""

    def take(self, packed: Tensor) -> None:
        """Take in on the host what :meth:`packed` has made."""

    def release(self) -> None:
        """Forget what is only true until the device goes on."""


class TensorRead:
    """One tensor of float64 numbers.

    Args:
        make: returns it, without waiting for the device.
    """

    is_changed = True

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None
        self._host: Tensor | None = None

    def on_host(self) -> Tensor:
        """Return it on the host, where it may be already."""
        return self._make().cpu() if self._host is None else self._host

    @property
    def device(self) -> torch.device:
        """The device of the tensor."""
        if self._made is None:
            self._made = self._make()
        return self._made.device

    def packed(self) -> Tensor:
        """Return the tensor as one row."""
        assert self._made is not None  # the device is asked for first
        return self._made.reshape(-1).view(torch.int64)

    def take(self, packed: Tensor) -> None:
        """Keep it."""
        assert self._made is not None
        self._host = packed.view(torch.float64).reshape(self._made.shape)

    def release(self) -> None:
        """Forget it."""
        self._made = self._host = None


def fetch(parts: Iterable[OnDevice]) -> None:
    """Copy to the host what has changed of these, by one copy per device: each is waited for."""
    by_device: dict[torch.device, list[OnDevice]] = {}
    for part in dict.fromkeys(parts):
        if part.is_changed:
            by_device.setdefault(part.device, []).append(part)
    for changed in by_device.values():
        packed = [part.packed() for part in changed]
        copied = (packed[0] if len(packed) == 1 else torch.cat(packed)).cpu()
        for part, piece in zip(changed, copied.split([len(row) for row in packed]), strict=True):
            part.take(piece)


@contextlib.contextmanager
def fetched(parts: Iterable[OnDevice]) -> Iterator[None]:
    """Have these on the host for a while, in which no step is made."""
    known = list(dict.fromkeys(parts))
    try:
        fetch(known)
        yield
    finally:
        for part in known:
            part.release()
