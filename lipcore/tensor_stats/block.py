"""Numbers of a stretch of training: statistics of tensors by place, and sums and maxima of what else is watched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional.tensor_stats import add_tensor_stats, empty_tensor_stats, merge_tensor_stats
from lipcore.metric.host_reads import TensorRead
from lipcore.metric.state import checked_tensor, is_count

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """How much a block holds.

    Attributes:
        places: rows of statistics.
        sums, most: numbers that are added up, and numbers of which the largest is kept.
    """

    places: int
    sums: int
    most: int

    @property
    def nbytes(self) -> int:
        """Bytes of a block on one device."""
        return 8 * (self.places * (_core.TENSOR_STATS + _core.TENSOR_BINS) + self.sums + self.most)


class Numbers:
    """The numbers of a block that lie on one device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.device = device
        self.rows, self.bins = empty_tensor_stats(size.places, device)
        self.sums = torch.zeros(size.sums, dtype=torch.float64, device=device)
        self.most = torch.full((size.most,), -torch.inf, dtype=torch.float64, device=device)
        self.read = TensorRead(self._flat)

    def _flat(self) -> Tensor:
        return torch.cat([self.rows.reshape(-1), self.bins.view(torch.float64).reshape(-1), self.sums, self.most])

    def clear(self) -> None:
        """Forget everything, in place."""
        for tensor in (self.rows, self.bins, self.sums):
            tensor.zero_()
        self.most.fill_(-torch.inf)

    def forget(self, begin: int, end: int) -> None:
        """Forget what these places have."""
        self.rows[begin:end].zero_()
        self.bins[begin:end].zero_()

    def merge(self, other: Numbers, *, gone: bool = False) -> None:
        """Add the numbers of another block, on the same device; with `gone` they leave it."""
        merge_tensor_stats((self.rows, self.bins), (other.rows, other.bins), range(len(self.rows)), gone=gone)
        if not (len(self.sums) or len(self.most)):
            return
        self.sums.add_(other.sums)
        torch.maximum(self.most, other.most, out=self.most)
        if gone:
            other.sums.zero_()
            other.most.fill_(-torch.inf)

    def on_host(self) -> Numbers:
        """Return the same on the CPU."""
        if self.device.type == "cpu":
            return self
        found = Numbers(Size(len(self.rows), len(self.sums), len(self.most)), _CPU)
        sizes = [found.rows.numel(), found.bins.numel(), found.sums.numel(), found.most.numel()]
        rows, bins, sums, most = self.read.on_host().split(sizes)
        found.rows.copy_(rows.view_as(found.rows))
        found.bins.copy_(bins.view(torch.int64).view_as(found.bins))
        found.sums.copy_(sums)
        found.most.copy_(most)
        return found


class Block:
    """A block of steps: numbers on every device that tensors came from."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.steps = 0  #: sampled ones
        self.passes = 0  #: forward passes whose outputs came
        self._on: dict[torch.device, Numbers] = {}

    def on(self, device: torch.device) -> Numbers:
        """Return the numbers on this device."""
        if device not in self._on:
            self._on[device] = Numbers(self.size, device)
        return self._on[device]

    @property
    def parts(self) -> list[Numbers]:
        """The numbers on all devices."""
        return list(self._on.values())

    def observe(self, tensors: Sequence[Tensor], places: Sequence[int]) -> dict[int, str]:
        """Add the statistics of tensors, each to its place; return the places of those that cannot be read, and why."""
        refused: dict[int, str] = {}
        devices = {tensor.device for tensor in tensors}
        for device in devices:
            numbers = self.on(device)
            into = numbers.rows, numbers.bins
            there, where = tensors, places
            if len(devices) > 1:
                there = [tensor for tensor in tensors if tensor.device == device]
                where = [place for tensor, place in zip(tensors, places, strict=True) if tensor.device == device]
            try:
                add_tensor_stats(there, into, where)
            except (TypeError, ValueError):  # and nothing was added
                refused |= _observed_one_by_one(list(zip(there, where, strict=True)), into)
        return refused

    def clear(self) -> None:
        """Forget everything."""
        self.steps = self.passes = 0
        for numbers in self.parts:
            numbers.clear()

    def merge(self, other: Block) -> None:
        """Add everything of another block."""
        self.steps += other.steps
        self.passes += other.passes
        for numbers in other.parts:
            self.on(numbers.device).merge(numbers)

    def take(self, other: Block) -> None:
        """Add everything of another block, and leave it empty."""
        self.steps += other.steps
        self.passes += other.passes
        other.steps = other.passes = 0
        for numbers in other.parts:
            self.on(numbers.device).merge(numbers, gone=True)

    def keep(self, places: Sequence[int], *, sums: bool = False) -> None:
        """Forget all places but these, and what extras have added up unless it is wanted."""
        gone = sorted({*range(self.size.places)} - {*places})
        for numbers in self.parts:
            for tensor in (numbers.rows, numbers.bins):
                tensor[gone] = 0
            if not sums:
                numbers.sums.zero_()
                numbers.most.fill_(-torch.inf)

    def on_host(self) -> Numbers:
        """Return what all devices have, on the CPU."""
        found = Numbers(self.size, _CPU)
        for numbers in self.parts:
            found.merge(numbers.on_host())
        return found

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers, of the histograms the bins that are used: [place, bin, count]."""
        numbers = self.on_host()
        where = numbers.bins.nonzero()
        counts = numbers.bins[where[:, 0], where[:, 1]].unsqueeze(1)
        state = {"rows": numbers.rows, "bins": torch.cat([where, counts], dim=1)}
        return state | {"sums": numbers.sums, "most": numbers.most, "steps": self.steps, "passes": self.passes}

    def loaded(self, state: Any, path: str) -> Block:
        """Return a block of this size from a state; ValueError naming the first key that does not fit."""
        if not isinstance(state, dict):
            raise ValueError(f"{path}: expected a dict, got {type(state).__name__}")
        for key in ("rows", "bins", "sums", "most", "steps", "passes"):
            if key not in state:
                raise ValueError(f"{path}.{key}: missing from the state")
        block = Block(self.size)
        numbers = block.on(_CPU)
        for key, mine in (("rows", numbers.rows), ("sums", numbers.sums), ("most", numbers.most)):
            mine.copy_(checked_tensor(f"{path}.{key}", state[key], torch.float64, tuple(mine.shape)))
        entries = checked_tensor(f"{path}.bins", state["bins"], torch.int64, (None, 3))
        place, bin_, count = entries.unbind(1)
        inside = (place >= 0) & (place < self.size.places) & (bin_ >= 0) & (bin_ < _core.TENSOR_BINS) & (count > 0)
        if not bool(inside.all()):
            raise ValueError(
                f"{path}.bins: expected [place, bin, count > 0] in each row, got {entries[~inside][0].tolist()}"
            )
        numbers.bins.index_put_((place, bin_), count, accumulate=True)
        if not torch.equal(numbers.bins.sum(1).double(), numbers.rows[:, 0]):
            raise ValueError(f"{path}.bins: counts do not add up to the number of elements in rows")
        for key in ("steps", "passes"):
            if not is_count(state[key]):
                raise ValueError(f"{path}.{key}: expected a count >= 0, got {state[key]!r}")
        block.steps, block.passes = state["steps"], state["passes"]
        return block


def _observed_one_by_one(pairs: Sequence[tuple[Tensor, int]], into: tuple[Tensor, Tensor]) -> dict[int, str]:
    """Add the tensors that can be read; return the places of the others, and why."""
    refused = {}
    for tensor, place in pairs:
        try:
            add_tensor_stats([tensor], into, [place])
        except (TypeError, ValueError) as error:  # noqa: PERF203
            refused[place] = str(error).removeprefix("tensors[0]: ")
    return refused
