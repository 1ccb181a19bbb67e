"""The autograd Functions of taps that pass an output on unchanged, to get at its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.capture.identity import passed_on
from lipcore.capture.taps.site import Site


class Probed(torch.autograd.Function):
    """The Function on an output in a compiled region: it gives the probe, a fresh leaf, the reduced gradient as its
    own, and is a pure function that can be traced."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, site: Site, extra: Any, *saved: Tensor) -> Tensor:
        ctx.site, ctx.extra = site, extra
        ctx.save_for_backward(*saved)
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = ctx.site.reduce(grad, ctx.extra, ctx.saved_tensors)
        return (grad, columns, None, None, *(None for _ in ctx.saved_tensors))


class Anchored(torch.autograd.Function):
    """The Function on an output that requires no gradient, behind a frozen first layer: its anchor requires one, so
    that the gradient at the output is computed."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, in_place_after: bool) -> Tensor:
        return passed_on(ctx, output, in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return None, None, None


class Summed(torch.autograd.Function):
    """The Function on an output whose gradient a leaf gets too, summed to its shape: what a parameter would get that
    was added to the output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, in_place_after: bool) -> Tensor:
        ctx.shape, ctx.dtype = leaf.shape, leaf.dtype
        return passed_on(ctx, output, in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad.to(ctx.dtype).sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return (grad if ctx.needs_input_grad[0] else None), total, None
