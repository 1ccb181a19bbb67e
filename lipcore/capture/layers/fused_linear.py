"""``fused=True``: a Linear whose weight gradient lipcore computes itself, taking the per-sample norms on the way."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lipcore.capture.identity import passed_on
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.layers import Batch, Rule

INSIDE = "inside the weight gradient"  #: the way of its norms, in words
LEAST_TOKENS = 48  # below, an ordinary weight gradient and a Gram cost less


def can_fuse(rule: Rule, module: Any, arguments: tuple[Any, ...], batch: Batch) -> bool:
    """Return whether lipcore can compute the weight's gradient of a call: of a Linear, on x alone, with sequences long
    enough."""
    if len(arguments) != 1 or not rule.fuses(module):
        return False
    x = arguments[0]
    tokens: int = x.numel() // max(1, x.shape[-1] * batch.size)
    return tokens >= LEAST_TOKENS and bool(module.weight.requires_grad)


class FusedSite(Protocol):
    """The site of a fused Linear, as its autograd Function sees it."""

    def fused_came_back(self, run: LayerPass, grad: Tensor, x: Tensor, inner: bool) -> Tensor | None:
        """Take the per-sample norms and return the weight's gradient; return None where torch is to compute it."""


class FusedLinear(torch.autograd.Function):
    """The backward of y = x W^T + b, in the place of torch's; y is what the layer itself has computed.

    Attributes:
        makes_another: True, unlike that of lipcore's identities, behind which the graph is as without them.
    """

    makes_another = True

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        site: FusedSite,
        run: LayerPass | None,
        inner: bool,
    ) -> Tensor:
        ctx.site, ctx.run, ctx.inner, ctx.x_dtype = site, run, inner, x.dtype
        # The output's dtype is autocast's. Without a gradient for x the weight may change before the backward pass.
        ctx.save_for_backward(x.to(output.dtype), weight if x.requires_grad else None)
        return passed_on(ctx, output, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_grad = (grad @ weight.to(grad.dtype)).to(ctx.x_dtype) if needs_x else None
        weight_grad = ctx.site.fused_came_back(ctx.run, grad, x, ctx.inner) if needs_weight else None
        if weight_grad is None and needs_weight:
            weight_grad = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
        # Gradients in another dtype than their leaf's are cast by the engine.
        return x_grad, weight_grad, bias_grad, None, None, None, None
