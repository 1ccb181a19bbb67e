"""Indices on a device, copied there once."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 64  # of what is kept: layers may come and go at random


class DeviceIndices:
    """Lists of indices as tensors on a device. They are kept, since copying one there waits for all that the device was
    told before."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._runs: dict[tuple[int, tuple[int, ...]], tuple[list[int], list[int]]] = {}

    def on(self, device: torch.device, index: Sequence[int]) -> Tensor:
        """Return an index on a device, int64; it is not to be changed."""
        key = device, tuple(index)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) > _MOST:
                self._kept.clear()
            found = self._kept[key] = torch.tensor(index, dtype=torch.int64, device=device)
        return found

    def runs(self, device: torch.device, index: Sequence[int], count: int) -> tuple[Tensor | None, Tensor]:
        """Return an order in which the rows of each index in [0, count) follow each other, None where they do already,
        and the offsets where these runs begin, and where the last one ends."""
        key = count, tuple(index)
        if key not in self._runs:
            if len(self._runs) > _MOST:
                self._runs.clear()
            order = sorted(range(len(index)), key=index.__getitem__)
            ordered = [index[i] for i in order]
            self._runs[key] = order, [bisect.bisect_left(ordered, k) for k in range(count + 1)]
        order, offsets = self._runs[key]
        is_sorted = order == list(range(len(order)))
        return None if is_sorted else self.on(device, order), self.on(device, offsets)
