"""Linear layers: squared norms of per-sample weight gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _library
from lipcore.functional import portable


def linear_norms_sq(x: Tensor, grad: Tensor, *, offsets: Tensor | None = None, method: str | None = None) -> Tensor:
    r"""Squared norms of per-sample weight gradients, :math:`\|\sum_t g_{bt} x_{bt}^T\|_F^2`, of y = x W^T."""
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.linear_norms_sq(x.detach(), grad.detach(), offsets, method)
        return traced
    return portable.linear_norms_sq(x, grad, offsets)


def linear_weight_grad(x: Tensor, grad: Tensor, *, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The batch's weight gradient :math:`\sum_b g_b^T x_b` and :func:`linear_norms_sq` of the same, in one pass."""
    if torch.compiler.is_compiling():
        traced: tuple[Tensor, Tensor] = torch.ops.lipcore.linear_weight_grad(x.detach(), grad.detach(), offsets)
        return traced
    return portable.linear_weight_grad(x, grad, offsets)


def _samples(x: Tensor, offsets: Tensor | None) -> int:
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


_library.register(
    "linear_norms_sq(Tensor x, Tensor grad, Tensor? offsets=None, str? method=None) -> Tensor",
    lambda x, grad, offsets=None, method=None: linear_norms_sq(x, grad, offsets=offsets, method=method),
    lambda x, grad, offsets=None, method=None: x.new_empty(_samples(x, offsets), dtype=torch.float64),
)
_library.register(
    "linear_weight_grad(Tensor x, Tensor grad, Tensor? offsets=None) -> (Tensor, Tensor)",
    lambda x, grad, offsets=None: linear_weight_grad(x, grad, offsets=offsets),
    lambda x, grad, offsets=None: (
        grad.new_empty(grad.shape[-1], x.shape[-1]),
        x.new_empty(_samples(x, offsets), dtype=torch.float64),
    ),
)
