"""The kinds of factors that layers' per-sample gradients come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore import functional
from lipcore.layers.factor import Factor, Sum

_float64 = torch.float64


def _cat(a: Tensor, b: Tensor, dim: int = 1) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.cat([a.to(dtype), b.to(dtype)], dim)


def _rows(x: Tensor, sample: int, offsets: Tensor | None) -> Tensor:
    """[T, ...] of one sample."""
    return x[sample] if offsets is None else x[int(offsets[sample]) : int(offsets[sample + 1])]


class _Tokens(Factor):
    """A factor made of gradients [B, T, features], or packed [N, features] with offsets."""

    grad: Tensor
    offsets: Tensor | None

    @property
    def samples(self) -> int:
        return self.grad.shape[0] if self.offsets is None else self.offsets.shape[0] - 1


class Outer(_Tokens):
    r"""Of a weight that multiplies: :math:`\sum_t g_{bt} x_{bt}^T`, x [B, T, I], grad [B, T, O]."""

    def __init__(
        self, x: Tensor, grad: Tensor, *, offsets: Tensor | None = None, shape: Sequence[int] | None = None
    ) -> None:
        self.x, self.grad, self.offsets, self.shape = x, grad, offsets, shape
        self.method: str | None = None

    def norms_sq(self) -> Tensor:
        if self.offsets is None and self.x.shape[1] == 1:
            return functional.outer_norms_sq([self.x.squeeze(1)], [self.grad.squeeze(1)])[0]
        return functional.linear_norms_sq(self.x, self.grad, offsets=self.offsets, method=self.method)

    def dense(self, sample: int) -> Tensor:
        g, x = (_rows(t, sample, self.offsets).to(_float64) for t in (self.grad, self.x))
        weight = g.T @ x
        return weight if self.shape is None else weight.reshape(*self.shape)

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Indexed):
            return other.join(self)
        if isinstance(other, Outer) and self.offsets is None and other.offsets is None:
            return Outer(_cat(self.x, other.x), _cat(self.grad, other.grad), shape=self.shape)
        return super().join(other)


class RowSum(_Tokens):
    r"""Of a bias, :math:`\sum_t g_{bt}`, or of an element-wise scale, :math:`\sum_t g_{bt} \odot x_{bt}`."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.grad, self.x, self.offsets, self.shape = grad, x, offsets, shape

    def norms_sq(self) -> Tensor:
        return functional.row_sum_norms_sq(self.grad, self.x, offsets=self.offsets)

    def dense(self, sample: int) -> Tensor:
        terms = _rows(self.grad, sample, self.offsets).to(_float64)
        if self.x is not None:
            terms = terms * _rows(self.x, sample, self.offsets)
        total = terms.sum(0)
        return total if self.shape is None else total.reshape(*self.shape)

    def join(self, other: Factor) -> Factor:
        if not isinstance(other, RowSum) or self.offsets is not None or other.offsets is not None:
            return super().join(other)
        if self.x is None and other.x is None:
            return RowSum(_cat(self.grad, other.grad), shape=self.shape)
        if self.x is None or other.x is None:
            return super().join(other)
        return RowSum(_cat(self.grad, other.grad), _cat(self.x, other.x), shape=self.shape)


class ChannelSum(Factor):
    r"""The same of channel layouts: :math:`\sum_s g_{bcs}` or :math:`\sum_s g_{bcs} x_{bcs}`, [B, C, \*space]."""

    def __init__(self, grad: Tensor, x: Tensor | None = None) -> None:
        self.grad, self.x = grad, x

    @property
    def samples(self) -> int:
        return self.grad.shape[0]

    def norms_sq(self) -> Tensor:
        return functional.channel_sum_norms_sq(self.grad, self.x)

    def dense(self, sample: int) -> Tensor:
        terms = self.grad[sample].to(_float64)
        if self.x is not None:
            terms = terms * self.x[sample]
        return terms.flatten(1).sum(1) if terms.dim() > 1 else terms

    def join(self, other: Factor) -> Factor:
        if isinstance(other, ChannelSum) and (self.x is None) == (other.x is None):
            grad = _cat(_flat(self.grad), _flat(other.grad), 2)
            if self.x is None or other.x is None:
                return ChannelSum(grad)
            return ChannelSum(grad, _cat(_flat(self.x), _flat(other.x), 2))
        return super().join(other)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


class Indexed(_Tokens):
    r"""Of an embedding's weight [V, D]: rows :math:`\sum_{t: i_{bt} = v} w_{bt} g_{bt}`, indices [B, T]."""

    def __init__(
        self,
        indices: Tensor,
        grad: Tensor,
        rows: int,
        *,
        padding_idx: int | None = None,
        weights: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        self.indices, self.grad, self.rows, self.offsets = indices, grad, rows, offsets
        self.padding_idx, self.weights = padding_idx, weights

    def norms_sq(self) -> Tensor:
        return functional.embedding_norms_sq(
            self.indices, self.grad, weights=self.weights, padding_idx=self.padding_idx, offsets=self.offsets
        )

    def dense(self, sample: int) -> Tensor:
        ids = _rows(self.indices, sample, self.offsets)
        terms = _rows(self.grad, sample, self.offsets).to(_float64)
        if self.weights is not None:
            terms = terms * _rows(self.weights, sample, self.offsets).unsqueeze(-1)
        if self.padding_idx is not None:
            terms = terms * (ids != self.padding_idx).unsqueeze(-1)
        return terms.new_zeros(self.rows, terms.shape[-1]).index_add_(0, ids, terms)

    def join(self, other: Factor) -> Factor:
        plain = self.offsets is None and self.weights is None
        if plain and isinstance(other, Outer) and other.offsets is None and other.shape is None:
            return Tied(self, other)
        if (
            plain
            and isinstance(other, Indexed)
            and other.offsets is None
            and other.weights is None
            and self.padding_idx == other.padding_idx
        ):
            indices, grad = torch.cat([self.indices, other.indices], 1), _cat(self.grad, other.grad)
            return Indexed(indices, grad, self.rows, padding_idx=self.padding_idx)
        return super().join(other)


class Tied(Factor):
    r"""Of one weight as embedding and as head: :math:`\|E\|^2 + \|H\|^2 + 2 \langle E, H\rangle`."""

    def __init__(self, embedding: Indexed, head: Outer) -> None:
        self.embedding, self.head = embedding, head

    @property
    def samples(self) -> int:
        return self.embedding.samples

    def norms_sq(self) -> Tensor:
        e, h = self.embedding, self.head
        cross = functional.tied_cross(e.indices, e.grad, h.x, h.grad, padding_idx=e.padding_idx)
        return (e.norms_sq() + h.norms_sq() + 2 * cross).clamp(min=0)

    def dense(self, sample: int) -> Tensor:
        return self.embedding.dense(sample) + self.head.dense(sample)

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Indexed):
            joined = self.embedding.join(other)
            return Tied(joined, self.head) if isinstance(joined, Indexed) else Sum([self, other])
        if isinstance(other, Outer):
            head = self.head.join(other)
            return Tied(self.embedding, head) if isinstance(head, Outer) else Sum([self, other])
        return super().join(other)


class Patches(Factor):
    """Of a convolution's weight; `options` are those of functional.conv_norms_sq."""

    def __init__(self, x: Tensor, grad: Tensor, shape: Sequence[int], **options: Any) -> None:
        self.x, self.grad, self.shape, self.options = x, grad, tuple(shape), options
        self.method: str | None = None

    @property
    def samples(self) -> int:
        return self.grad.shape[0]

    def norms_sq(self) -> Tensor:
        return functional.conv_norms_sq(self.x, self.grad, **self.options, method=self.method)

    def dense(self, sample: int) -> Tensor:
        x, grad = (t[sample : sample + 1].to(_float64) for t in (self.x, self.grad))
        weight = x.new_zeros(self.shape, requires_grad=True)
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.shape) - 3]
        o = self.options
        with torch.enable_grad():
            y = conv(x, weight, None, o["stride"], o["padding"], o["dilation"], o["groups"])
            for d, size in enumerate(grad.shape[2:], 2):
                y = y.narrow(d, 0, size)
            return torch.autograd.grad(y, weight, grad)[0]


class Dense(Factor):
    """Of a small parameter: the gradients themselves, [B, *shape]."""

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads

    @property
    def samples(self) -> int:
        return self.grads.shape[0]

    def norms_sq(self) -> Tensor:
        return functional.sample_norms(self.grads).square()

    def dense(self, sample: int) -> Tensor:
        return self.grads[sample].to(_float64)

    def join(self, other: Factor) -> Factor:
        if isinstance(other, Dense):
            return Dense(self.grads.to(_float64) + other.grads)
        return super().join(other)
