"""Convolutions: squared norms of per-sample weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _library
from lipcore.functional import portable


def conv_norms_sq(
    x: Tensor,
    grad: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    method: str | None = None,
) -> Tensor:
    r"""Squared norms :math:`\|\partial L_b / \partial W\|_F^2` of a convolution; x [B, C, \*space]."""
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.conv_norms_sq(
            x.detach(), grad.detach(), kernel_size, stride, padding, dilation, groups, method
        )
        return traced
    return portable.conv_norms_sq(x, grad, kernel_size, stride, padding, dilation, groups)


_library.register(
    "conv_norms_sq(Tensor x, Tensor grad, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups=1, str? method=None) -> Tensor",
    lambda x, grad, kernel_size, stride, padding, dilation, groups=1, method=None: conv_norms_sq(
        x,
        grad,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        method=method,
    ),
    lambda x, grad, kernel_size, stride, padding, dilation, groups=1, method=None: x.new_empty(
        x.shape[0], dtype=torch.float64
    ),
)
