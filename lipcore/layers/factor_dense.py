"""Gradients of small parameters, as they are; and gradients that are put together from blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore.layers.factor import Factor
from lipcore.layers.factor_vectors import Vectors


class Dense(Vectors):
    r"""The per-sample gradients themselves, [B, \*shape of the parameter]."""

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads
        self.shape = grads.shape[1:]

    @property
    def samples(self) -> int:
        return self.grads.shape[0]

    def norms_sq(self) -> Tensor:
        return self.vectors().square().sum(1)

    def vectors(self) -> Tensor:
        return self.grads.detach().double().reshape(self.samples, self.grads[:1].numel())

    def dense(self, sample: int) -> Tensor:
        return self.grads[sample].detach().double()

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Dense) and other.grads.shape == self.grads.shape:
            return Dense(self.grads.double() + other.grads.double())
        return super().join(other)


class Blocks(Factor):
    """The factors of consecutive blocks of a parameter's rows, such as the projections of queries, keys and values."""

    def __init__(self, parts: list[Factor]) -> None:
        self.parts = parts

    @property
    def samples(self) -> int:
        return self.parts[0].samples

    def norms_sq(self) -> Tensor:
        total = self.parts[0].norms_sq()
        for part in self.parts[1:]:
            total = total + part.norms_sq()
        return total

    def dense(self, sample: int) -> Tensor:
        return torch.cat([part.dense(sample) for part in self.parts])

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        return torch.cat([part.weighted_sum(coefficients) for part in self.parts])

    def dots(self, references: Tensor) -> Tensor:
        rows = references.split([part.shape[0] for part in self.parts], 1)
        return torch.stack([part.dots(r) for part, r in zip(self.parts, rows, strict=True)]).sum(0)

    def gram(self) -> Tensor:
        return torch.stack([part.gram() for part in self.parts]).sum(0)

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Blocks) and len(other.parts) == len(self.parts):
            # Blocks of one parameter by the same rule are the same rows.
            return Blocks([a.join(b) for a, b in zip(self.parts, other.parts, strict=True)])
        return super().join(other)
