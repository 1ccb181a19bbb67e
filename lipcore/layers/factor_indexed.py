"""Embeddings: the per-sample gradient has a row per token that occurs; and the same weight as a head's."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import functional as F
from lipcore.functional import library
from lipcore.functional.ordered_sums import sum_by_index
from lipcore.layers.factor import Factor
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_products import (
    CHUNK,
    alike,
    collected,
    gram_of_pairs,
    gram_of_slices,
    owners,
    spread,
)
from lipcore.layers.factor_rows import concatenate, number_of_samples, rows
from lipcore.layers.projections import LAST, directions, projected_rows


class Indexed(Factor):
    r"""The gradient of a table of `num` rows, of which row v is :math:`\sum_{t: i_{bt} = v} w_{bt} g_{bt}`. Shapes are
    indices [B, T], grad [B, T, D] and weights [B, T] (1 where None), or packed [N], [N, D] and [N] with offsets; the
    row `padding_idx` has no gradient."""

    def __init__(
        self,
        indices: Tensor,
        grad: Tensor,
        num: int,
        *,
        weights: Tensor | None = None,
        padding_idx: int | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        self.indices, self.grad, self.num = indices, grad, num
        self.weights, self.padding_idx, self.offsets = weights, padding_idx, offsets
        self.shape = torch.Size((num, grad.shape[-1]))

    @property
    def samples(self) -> int:
        return number_of_samples(self.indices, self.offsets)

    def norms_sq(self) -> Tensor:
        return F.embedding_norms_sq(
            self.indices, self.grad, weights=self.weights, padding_idx=self.padding_idx, offsets=self.offsets
        )

    def dense(self, sample: int) -> Tensor:
        indices, grad = (rows(t, self.offsets, sample) for t in (self.indices, self._weighted()))
        out = sum_by_index(grad.double(), indices, self.num)
        if self.padding_idx is not None:
            out[self.padding_idx] = 0
        return out

    def _terms(self) -> Tensor:
        """Return what every row adds to the table's row of its index: 0 to that of the padding."""
        (grad,) = alike(self.grad)
        if self.weights is not None:
            grad = grad * self.weights.detach().to(grad.dtype).unsqueeze(-1)
        if self.padding_idx is not None:
            grad = grad.masked_fill((self.indices == self.padding_idx).unsqueeze(-1), 0)
        return grad

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        terms = self._terms()
        terms = terms * spread(coefficients, terms, self.offsets).unsqueeze(-1)
        return sum_by_index(terms.flatten(0, -2), self.indices.flatten(), self.num)

    def projected_sum(self) -> Tensor:
        terms = self._terms()
        table = directions(0, terms.new_empty(self.num))
        found = projected_rows(terms, LAST) * table[:, self.indices.flatten()]
        if self.offsets is not None:
            found *= spread(found.new_ones(self.samples), terms, self.offsets)
        return found.sum(1)

    def dots(self, references: Tensor) -> Tensor:
        terms, tables = alike(self._terms(), references)
        found = (torch.linalg.vecdot(table[self.indices], terms) for table in tables)
        return torch.stack([collected(each, terms, self.offsets) for each in found])

    def gram(self) -> Tensor:
        terms, samples = self._terms(), self.samples
        # Of the table, the rows that occur; a few columns at a time.
        occurring, place = self.indices.flatten().unique(return_inverse=True)
        count = len(occurring)
        place = owners(terms, self.offsets) * count + place
        terms = terms.flatten(0, -2)
        step = max(1, CHUNK // max(1, samples * count))
        parts = (sum_by_index(part, place, (samples + 1) * count)[: samples * count] for part in terms.split(step, 1))
        return gram_of_slices((part.reshape(samples, count * part.shape[1]) for part in parts), samples, terms.device)

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Outer) and other.shape == (self.num, self.grad.shape[-1]):
            return Tied(self, other)
        if not isinstance(other, Indexed) or other.num != self.num:
            return super().join(other)
        # Uses of one weight may have different padding_idx: then it goes into the weights.
        same = self.padding_idx == other.padding_idx
        mine, theirs = (f._parts(fold_padding=not same) for f in (self, other))
        (indices, grad, weights), offsets = concatenate(mine, self.offsets, theirs, other.offsets)
        padding_idx = self.padding_idx if same else None
        return Indexed(indices, grad, self.num, weights=weights, padding_idx=padding_idx, offsets=offsets)

    def _parts(self, *, fold_padding: bool) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.grad.new_ones(self.indices.shape) if self.weights is None else self.weights
        if fold_padding and self.padding_idx is not None:
            weights = weights * (self.indices != self.padding_idx)
        return self.indices, self.grad, weights

    def _weighted(self) -> Tensor:
        return self.grad if self.weights is None else self.grad.double() * self.weights.unsqueeze(-1)


class Tied(Factor):
    r"""The gradient of an embedding's weight that is a head's too: :math:`\|E\|^2 + \|H\|^2 + 2 E{\cdot}H`."""

    def __init__(self, embedding: Indexed, head: Outer) -> None:
        self.embedding, self.head = embedding, head
        self.shape = embedding.shape

    @property
    def samples(self) -> int:
        return self.embedding.samples

    def norms_sq(self) -> Tensor:
        squares = self.embedding.norms_sq() + self.head.norms_sq()
        total: Tensor = (squares + 2 * self._cross()).clamp(min=0)  # clamp keeps NaN
        if not total.is_cpu:
            return total
        if not torch.compiler.is_compiling():
            return self._again(total, squares)
        e, h = self.embedding, self.head
        if e.offsets is None and h.offsets is None:
            parts = e.indices, e.grad, e.num, e.weights, e.padding_idx, h.x, h.grad
            total = torch.ops.lipcore.tied_again(total, squares, *parts)
        return total

    def _again(self, total: Tensor, squares: Tensor) -> Tensor:
        """Return the squared norms, those of samples for which both uses nearly cancel computed anew: the difference of
        float32 squares has no digits left there."""
        for sample in (total < 5e-3 * squares).nonzero().flatten().tolist():
            total[sample] = self.dense(sample).square().sum()
        return total

    def dense(self, sample: int) -> Tensor:
        return self.embedding.dense(sample) + self.head.dense(sample)

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        return self.embedding.weighted_sum(coefficients) + self.head.weighted_sum(coefficients)

    def projected_sum(self) -> Tensor:
        return self.embedding.projected_sum() + self.head.projected_sum()

    def dots(self, references: Tensor) -> Tensor:
        return self.embedding.dots(references) + self.head.dots(references)

    def gram(self) -> Tensor:
        cross = self._cross_gram()
        return self.embedding.gram() + self.head.gram() + cross + cross.T

    def _cross_gram(self) -> Tensor:
        """Return the inner products of sample i's gradient as a head's and sample j's as an embedding's."""
        e, h = self.embedding, self.head
        terms, x, grad = (t.flatten(0, -2) for t in alike(e._terms(), h.x, h.grad))
        indices = e.indices.flatten()
        return gram_of_pairs(
            lambda some: (x[some] @ terms.T) * grad[some][:, indices],
            owners(h.x, h.offsets),
            owners(e.indices, e.offsets),
            self.samples,
        )

    def join(self, other: Factor) -> Factor:
        for mine, theirs in ((self.embedding, self.head), (self.head, self.embedding)):
            if isinstance(other, type(mine)) and isinstance(joined := mine.join(other), type(mine)):
                return theirs.join(joined)
        return super().join(other)

    def _cross(self) -> Tensor:
        e, h = self.embedding, self.head
        parts, padding_idx = (e.indices, e._weighted(), h.x, h.grad), e.padding_idx
        if e.offsets is None and h.offsets is None:
            return F.tied_cross(*parts, padding_idx=padding_idx)
        offsets = (e.offsets, e.offsets, h.offsets, h.offsets)
        out = [torch.zeros(0, dtype=torch.float64, device=h.x.device)]
        for b in range(self.samples):
            sample = (rows(t, o, b)[None] for t, o in zip(parts, offsets, strict=True))
            out.append(F.tied_cross(*sample, padding_idx=padding_idx))
        return torch.cat(out)


def _tied_again(
    total: Tensor,
    squares: Tensor,
    indices: Tensor,
    grad: Tensor,
    num: int,
    weights: Tensor | None,
    padding_idx: int | None,
    x: Tensor,
    grad_head: Tensor,
) -> Tensor:
    embedding = Indexed(indices, grad, num, weights=weights, padding_idx=padding_idx)
    return Tied(embedding, Outer(x, grad_head))._again(total.clone(), squares)


library.register(
    "tied_again(Tensor total, Tensor squares, Tensor indices, Tensor grad, int num, Tensor? weights, int? padding_idx, "
    "Tensor x, Tensor grad_head) -> Tensor",
    _tied_again,
    lambda total, *_: torch.empty_like(total),
)
