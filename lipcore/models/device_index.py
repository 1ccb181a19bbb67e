"""Indices on a device, copied there once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 64  # of what is kept: layers may come and go at random


class DeviceIndices:
    """Lists of indices as tensors on a device. They are kept, since copying one there waits for all that the device was
    told before."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def on(self, device: torch.device, index: Sequence[int]) -> Tensor:
        """Return an index on a device, int64; it is not to be changed."""
        key = device, tuple(index)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) > _MOST:
                self._kept.clear()
            found = self._kept[key] = torch.tensor(index, dtype=torch.int64, device=device)
        return found
