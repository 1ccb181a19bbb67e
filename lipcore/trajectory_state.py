"""The copies a Trajectory keeps of its parameters."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lipcore import _core, functional

_ALIGNMENT = 64  # elements; every tensor's state starts on a cache line


class TrajectoryState:
    """The copies of all parameters: one flat allocation per kind and dtype, so that only w itself is scattered."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.counts = [tensor.numel() for tensor in tensors]
        self.dtypes = [tensor.dtype for tensor in tensors]
        self._flat: dict[str, Tensor] = {}
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []
        sizes: dict[torch.dtype, int] = {}
        offsets = []
        for tensor in tensors:
            offsets.append(sizes.get(tensor.dtype, 0))
            sizes[tensor.dtype] = offsets[-1] + -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        for dtype, size in sizes.items():
            mean_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            for kind in ("prev", "ref", "mean"):
                flat = torch.zeros(size, dtype=mean_dtype if kind == "mean" else dtype, device=tensors[0].device)
                _core.advise_huge_pages(flat)
                self._flat[self._key(kind, dtype)] = flat
        for tensor, offset in zip(tensors, offsets, strict=True):
            # The state of a dense parameter lies in memory as the parameter does (channels_last, transposed).
            views = [
                self._flat[self._key(kind, tensor.dtype)].as_strided(tensor.shape, tensor.stride(), offset)
                for kind in ("prev", "ref", "mean")
            ]
            if not tensor.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(tensor):
                views = [torch.empty(0)] * 3  # refused by name when the plan is captured
            else:
                views[0].copy_(tensor.detach())
                views[1].copy_(tensor.detach())
            self._views.append((views[0], views[1], views[2]))

    @staticmethod
    def _key(kind: str, dtype: torch.dtype) -> str:
        return f"{kind}.{str(dtype).removeprefix('torch.')}"

    def views(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._views[i]

    def bytes_of(self, i: int) -> int:
        return self.counts[i] * (2 * self.dtypes[i].itemsize + (8 if self.dtypes[i] == torch.float64 else 4))

    # ---- blocks of a long window

    def between(self, points: Tensor, folded: Tensor) -> Tensor:
        """Per parameter what lies between the open block's mean and the earlier blocks': Chan's n m / (n + m) ||a -
        b||^2."""
        differences = [mean - earlier for (_, _, mean), earlier in zip(self._views, self._earlier, strict=True)]
        norms = torch.cat([functional.sample_norms(d.reshape(1, d.numel())) for d in differences])
        return points * folded / (points + folded).clamp(min=1) * norms * norms

    def fold(self, points: Tensor, folded: Tensor) -> None:
        """Merge the open block's means into those of the earlier blocks; nothing waits for a device."""
        share = points / (points + folded).clamp(min=1)
        for i, earlier in enumerate(self._earlier):
            earlier.lerp_(self._views[i][2], share[i].to(earlier.dtype))

    @cached_property
    def _earlier(self) -> list[Tensor]:
        """Means of the earlier blocks; made when a window outgrows its first block."""
        return [torch.zeros_like(mean) for _, _, mean in self._views]

    @property
    def has_earlier(self) -> bool:
        """Whether some window has outgrown its first block."""
        return "_earlier" in self.__dict__

    # ---- what a checkpoint holds

    def tensors(self, *, earlier: bool) -> dict[str, Tensor]:
        """All tensors by name, the means of earlier blocks only if asked for (they are made then)."""
        means = {f"earlier.{i}": mean for i, mean in enumerate(self._earlier)} if earlier else {}
        return self._flat | means
