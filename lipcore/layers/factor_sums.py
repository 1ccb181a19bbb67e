"""Biases and scales: the per-sample gradient is a sum over rows (features last) or over space (channels second)."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import functional as F
from lipcore.functional.ordered_sums import sum_by_index
from lipcore.layers.factor import Factor
from lipcore.layers.factor_products import owners, product
from lipcore.layers.factor_rows import concatenate, number_of_samples, rows
from lipcore.layers.factor_vectors import Vectors


class RowSum(Vectors):
    r"""The sum over rows :math:`\sum_t g_{bt}`, or :math:`\sum_t g_{bt} \odot x_{bt}`: [B, T, F], or packed.

    shape: of the parameter, where it is not [F].
    """

    def __init__(
        self, grad: Tensor, x: Tensor | None = None, offsets: Tensor | None = None, shape: torch.Size | None = None
    ) -> None:
        self.grad, self.x, self.offsets = grad, x, offsets
        self.shape = grad.shape[-1:] if shape is None else shape

    @property
    def samples(self) -> int:
        return number_of_samples(self.grad, self.offsets)

    def norms_sq(self) -> Tensor:
        return F.row_sum_norms_sq(self.grad, self.x, offsets=self.offsets)

    def norms_sq_with(self, other: Factor) -> tuple[Tensor, Tensor] | None:
        if type(self) is not RowSum or self.x is None or not is_sum_of(other, self.grad, self.offsets):
            return None
        scale, shift = F.affine_norms_sq(self.grad, self.x, offsets=self.offsets)
        return scale, shift

    def dense(self, sample: int) -> Tensor:
        terms = rows(self.grad, self.offsets, sample).double()
        if self.x is not None:
            terms = terms * rows(self.x, self.offsets, sample)
        return terms.sum(0).reshape(self.shape)

    def vectors(self) -> Tensor:
        terms = product(self.grad, self.x)
        if self.offsets is None:
            return terms.sum(1) if terms.shape[1] != 1 else terms[:, 0]
        return sum_by_index(terms, owners(self.grad, self.offsets), self.samples + 1)[:-1]

    def join(self, other: Factor) -> Factor:
        if not isinstance(other, RowSum) or other.shape != self.shape:
            return super().join(other)
        if self.x is None and other.x is None:
            (grad,), offsets = concatenate((self.grad,), self.offsets, (other.grad,), other.offsets)
            return RowSum(grad, None, offsets, self.shape)
        mine, theirs = ((f.grad, torch.ones_like(f.grad) if f.x is None else f.x) for f in (self, other))
        (grad, x), offsets = concatenate(mine, self.offsets, theirs, other.offsets)
        return RowSum(grad, x, offsets, self.shape)


def is_sum_of(factor: Factor, grad: Tensor, offsets: Tensor | None) -> bool:
    """Return whether the factor sums the rows of this very gradient."""
    return type(factor) is RowSum and factor.x is None and factor.grad is grad and factor.offsets is offsets


class ChannelSum(Vectors):
    r"""The sum over space :math:`\sum_s g_{bcs}`, or :math:`\sum_s g_{bcs} x_{bcs}`: [B, C, \*space] or [B, C]."""

    def __init__(self, grad: Tensor, x: Tensor | None = None) -> None:
        self.grad, self.x = grad, x
        self.shape = grad.shape[1:2]

    @property
    def samples(self) -> int:
        return self.grad.shape[0]

    def norms_sq(self) -> Tensor:
        return F.channel_sum_norms_sq(self.grad, self.x)

    def norms_sq_with(self, other: Factor) -> tuple[Tensor, Tensor] | None:
        if not (type(self) is type(other) is ChannelSum):
            return None
        if self.x is None or other.x is not None or other.grad is not self.grad:
            return None
        scale, shift = F.channel_affine_norms_sq(self.grad, self.x)
        return scale, shift

    def dense(self, sample: int) -> Tensor:
        terms = self.grad[sample].detach().double()
        if self.x is not None:
            terms = terms * self.x[sample].detach()
        return terms.flatten(1).sum(1) if terms.dim() > 1 else terms

    def vectors(self) -> Tensor:
        terms = product(self.grad, self.x)
        return terms.flatten(2).sum(2) if terms.dim() > 2 else terms

    def join(self, other: Factor) -> Factor:
        if not isinstance(other, ChannelSum) or other.grad.shape[1] != self.grad.shape[1]:
            return super().join(other)
        grad = _along_space(self.grad, other.grad)
        if self.x is None and other.x is None:
            return ChannelSum(grad)
        mine, theirs = (torch.ones_like(f.grad) if f.x is None else f.x for f in (self, other))
        return ChannelSum(grad, _along_space(mine, theirs))


def _along_space(*tensors: Tensor) -> Tensor:
    return torch.cat([t.flatten(2) if t.dim() > 2 else t.unsqueeze(2) for t in tensors], 2)
