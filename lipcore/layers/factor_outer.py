"""Weights that multiply a row: the per-sample gradient is a sum of outer products of output gradients and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _core
from lipcore import functional as F
from lipcore.functional.linear import Method, way
from lipcore.layers.factor import Factor
from lipcore.layers.factor_products import CHUNK, alike, collected, gram_of_pairs, gram_of_slices, owners, spread
from lipcore.layers.factor_rows import concatenate, number_of_samples, rows
from lipcore.layers.factor_sums import is_sum_of
from lipcore.layers.projections import LAST, projected_rows


class Outer(Factor):
    r"""The sum of :math:`g_{bt} x_{bt}^T` over rows t, of x [B, T, I] and grad [B, T, O], or packed with offsets.

    Args:
        method: how a sequence is contracted, None for the cost rule of :func:`lipcore.functional.linear_norms_sq`.
        shape: of the parameter, where it is not [O, I].
    """

    def __init__(
        self,
        x: Tensor,
        grad: Tensor,
        offsets: Tensor | None = None,
        method: Method | None = None,
        shape: torch.Size | None = None,
    ) -> None:
        self.x, self.grad, self.offsets, self.method = x, grad, offsets, method
        self.shape = torch.Size((grad.shape[-1], x.shape[-1])) if shape is None else shape

    @property
    def samples(self) -> int:
        return number_of_samples(self.x, self.offsets)

    @property
    def how(self) -> str:
        return "product of norms" if self._has_one_row() else way(self.x, self.grad, self.offsets, self.method)

    def norms_sq(self) -> Tensor:
        if self._has_one_row():
            return F.outer_norms_sq([self.x[:, 0]], [self.grad[:, 0]])[0]
        return F.linear_norms_sq(self.x, self.grad, offsets=self.offsets, method=self.method)

    def norms_sq_with(self, other: Factor) -> tuple[Tensor, Tensor] | None:
        if type(self) is not Outer or not self._has_one_row() or not is_sum_of(other, self.grad, None):
            return None
        weight, bias = F.outer_and_bias_norms_sq([self.x[:, 0]], [self.grad[:, 0]])
        return weight[0], bias[0]

    def _has_one_row(self) -> bool:
        return self.offsets is None and self.x.shape[1] == 1

    def dense(self, sample: int) -> Tensor:
        x, grad = (rows(t, self.offsets, sample).double() for t in (self.x, self.grad))
        return (grad.T @ x).reshape(self.shape)

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        x, grad = alike(self.x, self.grad)
        scaled = grad * spread(coefficients, grad, self.offsets).unsqueeze(-1)
        return (scaled.flatten(0, -2).T @ x.flatten(0, -2)).reshape(self.shape)

    def projected_sum(self) -> Tensor:
        return super().projected_sum() if self.is_reshaped else self.projected_rows().sum(1)

    @property
    def is_reshaped(self) -> bool:
        """True where the parameter is not [O, I]."""
        return self.shape != (self.grad.shape[-1], self.x.shape[-1])

    def projected_rows(self, axis: int = 0) -> Tensor:
        """Return the projections of every row's outer product, float64 [K, N]; 0 of rows outside all samples. `axis`:
        the number of dimension O in the parameter."""
        x, grad = alike(self.x, self.grad)
        found = projected_rows(grad, axis) * projected_rows(x, LAST)
        if self.offsets is not None:
            found *= spread(found.new_ones(self.samples), grad, self.offsets)
        return found

    def dots(self, references: Tensor) -> Tensor:
        x, grad, flat = alike(self.x, self.grad, references.flatten(1))
        rows = []
        for weight in flat.reshape(len(flat), grad.shape[-1], x.shape[-1]):
            # b^T R a, by the product that leaves fewer numbers per row.
            narrow = weight.shape[0] < weight.shape[1]
            terms = torch.linalg.vecdot(x @ weight.T, grad) if narrow else torch.linalg.vecdot(grad @ weight, x)
            rows.append(collected(terms, x, self.offsets))
        return torch.stack(rows)

    def gram(self) -> Tensor:
        x, grad = (t.flatten(0, -2) for t in alike(self.x, self.grad))
        owner, samples = owners(self.x, self.offsets), self.samples
        count, features, outputs = len(x), x.shape[-1], grad.shape[-1]
        if _core.linear_suits_pairs(count, samples, features, outputs):
            return gram_of_pairs(lambda some: (x[some] @ x.T) * (grad[some] @ grad.T), owner, owner, samples)
        step = max(1, CHUNK // max(1, samples * features))
        parts = (self._slice(x, part, owner) for part in grad.split(step, 1))
        return gram_of_slices(parts, samples, x.device)

    def _slice(self, x: Tensor, grad: Tensor, owner: Tensor) -> Tensor:
        """Return all samples' gradients of some outputs, [B, n]."""
        if self.offsets is None:
            tokens = self.x.shape[:2]
            products: Tensor = grad.unflatten(0, tokens).mT @ x.unflatten(0, tokens)
            return products.flatten(1)
        found = [grad[mine].T @ x[mine] for mine in (owner == b for b in range(self.samples))]
        return torch.stack(found).flatten(1)

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Outer) and other.shape == self.shape:
            pair = (self.x, self.grad), self.offsets, (other.x, other.grad), other.offsets
            (x, grad), offsets = concatenate(*pair)
            return Outer(x, grad, offsets, self.method or other.method, self.shape)
        # An embedding knows how it meets a head, a sum how it takes one more.
        return super().join(other) if type(other).join in (Factor.join, Outer.join) else other.join(self)
