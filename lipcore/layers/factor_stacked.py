"""Several tensors stacked in one parameter, of which each row meets one: the experts of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore.layers.factor import Factor
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_products import alike, owners, spread, vector_sum
from lipcore.layers.factor_sums import RowSum
from lipcore.layers.projections import directions


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

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        pairs = self.pairs
        if isinstance(pairs, RowSum):
            vectors = pairs.vectors().unflatten(0, (self.samples, self.parts))
            return vector_sum(vectors.flatten(1), coefficients, self.shape)
        if not isinstance(pairs, Outer) or pairs.is_reshaped:
            return super().weighted_sum(coefficients)
        # Part by part: the rows of all samples that meet it.
        x, grad = (t.flatten(0, -2) for t in alike(pairs.x, pairs.grad))
        scales = spread(coefficients.repeat_interleave(self.parts), pairs.x, pairs.offsets).expand(pairs.x.shape[:-1])
        part, total = owners(pairs.x, pairs.offsets) % self.parts, grad.new_zeros(self.shape)
        for number in range(self.parts):
            mine = (part == number).nonzero().flatten()
            total[number] = (grad[mine] * scales.flatten()[mine, None].to(grad.dtype)).T @ x[mine]
        return total

    def projected_sum(self) -> Tensor:
        pairs = self.pairs
        if not isinstance(pairs, Outer) or pairs.is_reshaped:
            return super().projected_sum()
        rows = pairs.projected_rows(axis=1)
        part = owners(pairs.x, pairs.offsets) % self.parts
        return (rows * directions(0, rows.new_empty(self.parts))[:, part]).sum(1)

    def dense(self, sample: int) -> Tensor:
        return torch.stack([self.pairs.dense(sample * self.parts + part) for part in range(self.parts)])
