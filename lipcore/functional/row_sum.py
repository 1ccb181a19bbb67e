"""Biases and element-wise scales: squared norms of sums over a sample's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _library
from lipcore.functional import portable


def row_sum_norms_sq(grad: Tensor, x: Tensor | None = None, *, offsets: Tensor | None = None) -> Tensor:
    r"""Squared norms of :math:`\sum_t g_{bt}` (a bias), or of :math:`\sum_t g_{bt} \odot x_{bt}` (a scale)."""
    if torch.compiler.is_compiling():
        x = None if x is None else x.detach()
        traced: Tensor = torch.ops.lipcore.row_sum_norms_sq(grad.detach(), x, offsets)
        return traced
    return portable.row_sum_norms_sq(grad, x, offsets)


def channel_sum_norms_sq(grad: Tensor, x: Tensor | None = None) -> Tensor:
    r"""Squared norms of :math:`\sum_s g_{bcs}` or :math:`\sum_s g_{bcs} x_{bcs}` over the space of [B, C, \*space]."""
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.channel_sum_norms_sq(grad.detach(), None if x is None else x.detach())
        return traced
    return portable.channel_sum_norms_sq(grad, x)


_library.register(
    "row_sum_norms_sq(Tensor grad, Tensor? x=None, Tensor? offsets=None) -> Tensor",
    lambda grad, x=None, offsets=None: row_sum_norms_sq(grad, x, offsets=offsets),
    lambda grad, x=None, offsets=None: grad.new_empty(
        grad.shape[0] if offsets is None else offsets.shape[0] - 1, dtype=torch.float64
    ),
)
_library.register(
    "channel_sum_norms_sq(Tensor grad, Tensor? x=None) -> Tensor",
    lambda grad, x=None: channel_sum_norms_sq(grad, x),
    lambda grad, x=None: grad.new_empty(grad.shape[0], dtype=torch.float64),
)
