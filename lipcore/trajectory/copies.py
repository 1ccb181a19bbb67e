"""The copies that exact statistics need of every tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipcore import _core, functional
from lipcore.functional.update_rules import DIFFERENCE

_ALIGNMENT = 64  # elements; every tensor's state starts on a cache line


def squared_distances(ones: list[Tensor], others: list[Tensor]) -> Tensor:
    """Return ||one - other||^2 of every pair, as float64; NaN where either is not finite."""
    nothing: list[Tensor | None] = [None] * len(ones)
    return functional.update_sums(ones, others, nothing, [DIFFERENCE] * len(ones))[0][:, 0]


def mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which it is kept how far a tensor lies from its mean."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bytes_of(count: int, dtype: torch.dtype, *, per_element: bool = False, blocks: int = 1) -> dict[str, int]:
    """Return the persistent bytes per kind of state of a tensor; `blocks` is how many blocks' means are kept."""
    mean = count * mean_dtype(dtype).itemsize
    size = {"previous values": count * dtype.itemsize, "reference": count * dtype.itemsize, "mean": mean}
    size["mean of earlier blocks (in windows longer than 512 steps)"] = 8 * count
    if blocks > 1:
        size["means of closed blocks"] = mean * (blocks - 1)
    if per_element:
        size["variance per element"] = mean * (1 + blocks)
    return size


class Copies:
    """Previous values, reference point and running mean of every tensor: one flat allocation per kind and dtype, so
    that only the tensors themselves are scattered.

    Of the mean over the open block, of at most 512 steps, `deviation` says how far the previous values lie from it: a
    step needs no more, and reads no reference. `earlier` holds the mean of the offset from the reference over the
    window's blocks before it, in float64: a float32 one would lose 8e-6 of the variance by rounding in 1e6 drifting
    steps. `m2` and `earlier_m2` are sums of squared deviations per element, where they were asked for.
    """

    def __init__(self, tensors: list[Tensor], *, per_element: bool) -> None:
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.counts = [tensor.numel() for tensor in tensors]
        self._layouts = [(tensor.shape, tensor.stride()) for tensor in tensors]
        self._offsets: list[int] = []
        self._sizes: dict[torch.dtype, int] = {}
        self._device = tensors[0].device
        for tensor in tensors:
            self._offsets.append(self._sizes.get(tensor.dtype, 0))
            self._sizes[tensor.dtype] = self._offsets[-1] + -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        self.prev, self.ref = self._allocate(lambda dtype: dtype), self._allocate(lambda dtype: dtype)
        self.deviation = self._allocate(mean_dtype)
        self.per_element = per_element
        self.m2 = self._allocate(mean_dtype) if per_element else []
        self.earlier: list[Tensor] = []  # made when a window outgrows its first block
        self.earlier_m2: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
                self.prev[i].copy_(tensor.detach())
                self.ref[i].copy_(tensor.detach())
            else:  # refused by name when the plan is captured
                self.prev[i] = torch.empty(0, device="cpu")

    def _allocate(self, kept_in: Callable[[torch.dtype], torch.dtype]) -> list[Tensor]:
        """Make zeros with every tensor's own layout: a dense parameter's state lies in memory as the parameter does."""
        flats = {}
        for dtype, size in self._sizes.items():
            flats[dtype] = torch.zeros(size, dtype=kept_in(dtype), device=self._device)
            _core.advise_huge_pages(flats[dtype])  # pages come when they are written first
        layouts = zip(self.dtypes, self._layouts, self._offsets, strict=True)
        return [flats[dtype].as_strided(*layout, offset) for dtype, layout, offset in layouts]

    def make_earlier(self) -> None:
        """Make sure that there are means of earlier blocks."""
        if not self.earlier:
            self.earlier = self._allocate(lambda _: torch.float64)
            self.earlier_m2 = self._allocate(mean_dtype) if self.per_element else []

    def take_earlier(self) -> tuple[list[Tensor], list[Tensor]]:
        """Hand over the earlier blocks' means (and per-element sums), and start new ones."""
        means = [earlier.to(each.dtype) for earlier, each in zip(self.earlier, self.deviation, strict=False)]
        taken = means, self.earlier_m2
        self.earlier, self.earlier_m2 = [], []
        return taken

    def entry(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the copies of tensor i that a compiled plan writes to."""
        return self.prev[i], self.deviation[i], self.m2[i] if self.per_element else None

    def mean(self, i: int) -> Tensor:
        """Return the mean of tensor i's offset from the reference over the open block, in float64."""
        return (self.prev[i].double() - self.ref[i].double()).sub_(self.deviation[i])

    def jump(self, i: int, values: Tensor) -> None:
        """Let the next step of tensor i start from these values; the mean of the points stays where it is."""
        self.deviation[i].add_((values.double() - self.prev[i].double()).to(self.deviation[i].dtype))
        self.prev[i].copy_(values)

    def fold(self, points: Tensor, folded: Tensor) -> Tensor:
        """Merge the open block's means into those of the earlier blocks; how far apart they were, squared, per tensor.
        Nothing waits for a device."""
        self.make_earlier()
        share = points / (points + folded).clamp(min=1)
        for i in range(len(self.m2)):
            weight = share[i].to(self.m2[i].dtype)
            apart = (self.mean(i) - self.earlier[i]).to(weight).square_().mul_(folded[i].to(weight) * weight)
            self.earlier_m2[i].add_(apart).add_(torch.where(points[i] > 0, self.m2[i], torch.zeros_like(weight)))
        gap_sq = torch.empty_like(share)
        _core.fold_means(self.prev, self.ref, self.deviation, self.earlier, share, gap_sq)
        return gap_sq

    def shift(self, means: list[Tensor], reference: list[Tensor]) -> None:
        """Turn means of offsets from the present reference into those of offsets from another one."""
        for mean, old, new in zip(means, self.ref, reference, strict=True):
            mean.add_((old.double() - new.double()).to(mean.dtype))

    # ---- what a checkpoint holds

    def state(self, i: int) -> dict[str, Tensor]:
        """Return tensor i's copies by kind."""
        kinds = {"prev": self.prev, "ref": self.ref, "deviation": self.deviation, "m2": self.m2}
        kinds |= {"earlier": self.earlier, "earlier_m2": self.earlier_m2}
        return {kind: tensors[i] for kind, tensors in kinds.items() if tensors}
