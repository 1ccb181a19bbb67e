"""Several tensors stacked in one parameter, of which each row meets one: the experts of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore.layers.factor import Factor


class Stacked(Factor):
    r"""The per-sample gradients of a parameter [E, \*shape], from those of all B E pairs of a sample and a part.

    Args:
        pairs: the gradients of the parts, in the order of the samples, and of the parts in a sample.
        parts: E.
    """

    def __init__(self, pairs: Factor, parts: int) -> None:
        self.pairs, self.parts = pairs, parts
        self.shape = torch.Size((parts, *pairs.shape))

    @property
    def samples(self) -> int:
        return self.pairs.samples // self.parts

    @property
    def how(self) -> str:
        return self.pairs.how

    def norms_sq(self) -> Tensor:
        return self.pairs.norms_sq().reshape(-1, self.parts).sum(1)

    def dense(self, sample: int) -> Tensor:
        return torch.stack([self.pairs.dense(sample * self.parts + part) for part in range(self.parts)])
