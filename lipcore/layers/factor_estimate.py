"""Weights that multiply a row, whose norms are estimated from random probes instead of computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import functional as F
from lipcore.layers.factor import Factor
from lipcore.layers.factor_outer import Outer


class Signs:
    """The random numbers of estimates, one generator per device: torch's default ones belong to the training, which
    stays as it is."""

    def __init__(self) -> None:
        self._of: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        generator = self._of.get(device)
        if generator is None:
            generator = self._of[device] = torch.Generator(device).manual_seed(0)
        return generator


class EstimatedOuter(Outer):
    """An :class:`Outer` whose norms_sq() is an unbiased estimate, and exact where a sample has one row only.

    Attributes:
        standard_error: of norms_sq(), float64 [B], once that was called; None where it is exact.
    """

    def __init__(self, outer: Outer, signs: Signs) -> None:
        super().__init__(outer.x, outer.grad, outer.offsets, shape=outer.shape)
        self._signs = signs
        self.standard_error: Tensor | None = None

    @property
    def how(self) -> str:
        return super().how if self._has_one_row() else "estimate"

    def norms_sq(self) -> Tensor:
        if self._has_one_row():
            return super().norms_sq()
        generator = self._signs.on(self.x.device)
        norms_sq, self.standard_error = F.linear_norms_sq_estimate(
            self.x, self.grad, offsets=self.offsets, generator=generator
        )
        return norms_sq

    def join(self, other: Factor) -> Factor:
        joined = super().join(other)
        return EstimatedOuter(joined, self._signs) if type(joined) is Outer else joined
