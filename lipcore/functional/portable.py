"""The per-sample norms in torch's own operations, for devices and cases that no kernel serves: exact, no host
synchronisation but where sequences are packed, in memory that is bounded.

Operands are scaled by their largest entry per sample, so that nothing under- or overflows in float32; sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_float64 = torch.float64


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [B, ...] in its working type with max |x_b| = 1, and the squares of what was divided by, float64 [B]."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return x, x.new_ones(x.shape[0], dtype=_float64)
    largest = x.flatten(1).abs().amax(1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    return x / largest.reshape(-1, *[1] * (x.dim() - 1)), largest.to(_float64).square()


def squares(x: Tensor) -> Tensor:
    """Return the sum of squares per sample, float64."""
    return x.flatten(1).to(_float64).square().sum(1)


def pieces(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Return the samples of packed rows."""
    return x.detach().tensor_split(offsets[1:-1].cpu()) if len(offsets) > 1 else ()


def three_dimensional(x: Tensor) -> Tensor:
    """Return x as [B, T, features]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def normalized(x: Tensor, eps: float, center: bool) -> Tensor:
    """Return the rows of a norm layer's input as it normalises them, in float32 at least."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if center:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def tied_cross(
    indices: Tensor, grad_embedding: Tensor, x: Tensor, grad_head: Tensor, padding_idx: int | None
) -> Tensor:
    samples = indices.shape[0]
    ids = indices.flatten(1)
    e, a, g = (three_dimensional(t.detach()) for t in (grad_embedding, x, grad_head))
    e = e.to(_float64)
    if padding_idx is not None:
        e = e * (ids != padding_idx).unsqueeze(-1)
    parts = [(a[b].to(_float64) @ e[b].T * g[b][:, ids[b]]).sum() for b in range(samples)]
    return torch.stack(parts) if parts else e.new_zeros(0)


def conv_norms_sq(
    x: Tensor,
    grad: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, grad.dtype)
    (a, a_scale), (g, g_scale) = (scaled(t.to(dtype)) for t in (x, grad))
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel_size, stride, strict=True)
    ]
    fill = [n for have, want in zip(g.shape[:1:-1], reversed(spatial), strict=True) for n in (0, want - have)]
    g = torch.nn.functional.pad(g, fill) if any(fill) else g
    weight = a.new_empty(g.shape[1], a.shape[1] // groups, *kernel_size)
    zeros = [0] * len(kernel_size)
    parts = [
        torch.ops.aten.convolution_backward(
            h, b, weight, None, stride, padding, dilation, False, zeros, groups, [False, True, False]
        )[1]
        for b, h in zip(a.split(1), g.split(1), strict=True)
    ]
    norms = torch.cat([squares(part[None]) for part in parts]) if parts else a.new_zeros(0, dtype=_float64)
    return norms * a_scale * g_scale
