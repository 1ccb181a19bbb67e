"""What the inner products of one rank's samples add to the window of all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.metric.distribution import Distribution
from lipcore.metric.results import MetricResult
from lipcore.per_sample.rank_part import PerSamplePart
from lipcore.per_sample.signed import add_dots

_OTHERS = (
    "reference: rank {1} has multiplied its samples with other references than rank {0}, or has set them at another "
    "step, so their products are not of one kind; give all ranks the same bits, at the same step: the gradient that "
    "ranks have reduced, full_tensor() of sharded ones, or one rank's by torch.distributed.broadcast()"
)


class UsedReferences:
    """The bits of the references that the samples of a window were multiplied with, by block: the same on ranks that
    have set the same ones at the same steps.

    Args:
        bits: of the first ones, int64.
        blocks: of the window.

    Attributes:
        used: samples of the open block were multiplied.
    """

    def __init__(self, bits: Tensor, blocks: int) -> None:
        self._now, self._blocks = bits, deque([bits], maxlen=blocks)
        self.used, self._began = False, 0

    def change(self, bits: Tensor, step: int) -> None:
        """Note that following samples are multiplied with others."""
        self._now = bits
        before = self._blocks.pop().to(bits.device)
        unused = step == self._began and not self.used
        self._blocks.append(bits if unused else 1000003 * before + bits + step)

    def advance(self, step: int, *, waiting: bool) -> None:
        """Start a block, which has the present ones, and those of the last one where samples of it are `waiting`; the
        oldest one falls out."""
        self._blocks.append(self._blocks[-1] if waiting else self._now)
        self.used, self._began = waiting, step

    def reset(self, step: int, *, waiting: bool) -> None:
        """Start a window."""
        self.advance(step, waiting=waiting)
        while len(self._blocks) > 1:
            self._blocks.popleft()

    @property
    def bits(self) -> Tensor:
        """A number that is the same for the same references in all blocks."""
        found = torch.zeros_like(self._now)
        for block in self._blocks:
            found = 1000003 * found + block.to(found.device)
        return found


@dataclass
class DotsPart(PerSamplePart):
    """Distributions of one rank's inner products over a window.

    Attributes:
        names: of the measured parameters, hashed: ranks of which these are the same have the same references.
        bits: of these references, int64, where they are.
    """

    names: str = ""
    bits: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu"))
    apart: str = ""  #: in what the references of ranks differ

    @property
    def told(self) -> dict[str, Any]:
        """Reasons on this rank, and which references it has. Waits for the device."""
        return super().told | {"reference": [self.names, int(self.bits)]}

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take the reasons of all ranks, and compare their references."""
        super().hear(told)
        first: dict[str, tuple[int, int]] = {}
        for rank, each in zip(self.holding.ranks, told, strict=True):
            names, bits = each["reference"]
            other, its_bits = first.setdefault(names, (rank, bits))
            if bits != its_bits and not self.apart:
                self.apart = _OTHERS.format(other, rank)

    def refused(self) -> str:
        """Return in what the references of ranks differ, once these have told."""
        return self.apart

    def _add_numbers(self, result: MetricResult, total: str, distributions: Sequence[Distribution], note: str) -> None:
        names = self.agreed["quantities"]
        add_dots(result, self._all_layers, total, distributions, names, note, self._doubt)
