"""The autograd Functions on tapped outputs, which pass them on and hand what comes back to the layer's site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.capture.identity import passed_on
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.proof import is_proof

#: In the place of the number of regions, in the last row of a probe: a call did not fit its rule.
REFUSED = -64.0


class Tapped(torch.autograd.Function):
    """The Function on a tapped output, which it passes on; the activations are its saved tensors, so that checkpointing
    and offloading apply."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, site: Any, run: LayerPass, extra: Any, inner: bool, *saved: Tensor) -> Tensor:
        ctx.site, ctx.run, ctx.extra, ctx.inner = site, run, extra, inner
        ctx.save_for_backward(*saved)
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.site.came_back(ctx.run, grad, ctx.extra, ctx.inner, ctx.saved_tensors)
        return (grad, *(None for _ in range(len(ctx.needs_input_grad) - 1)))


class Probed(torch.autograd.Function):
    """The Function on a tapped output in a compiled region, where the numbers of one call leave as the gradient of a
    probe."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, site: Any, extra: Any, *saved: Tensor) -> Tensor:
        ctx.site, ctx.extra, ctx.samples = site, extra, probe.shape[1]
        ctx.save_for_backward(*saved)
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = ctx.site.reduce(grad, ctx.extra, ctx.saved_tensors, ctx.samples)
        return (grad, columns, None, None, *(None for _ in ctx.saved_tensors))


class Refused(torch.autograd.Function):
    """The Function on the output of a call in a compiled region that the layer's rule is not for: the probe gets NaN,
    and REFUSED in the place of the number of regions."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, site: Any) -> Tensor:
        ctx.shape = probe.shape
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, samples = ctx.shape
        nothing = torch.full((rows - 1, samples), torch.nan, dtype=torch.float64, device=grad.device)
        refused = torch.full((1, samples), REFUSED, dtype=torch.float64, device=grad.device)
        return grad, torch.cat([nothing, refused]), None


class Strayed(torch.autograd.Function):
    """The Function on the output of a layer that was called outside the model's forward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, site: Any) -> Tensor:
        ctx.site = site
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not is_proof():
            ctx.site.strayed()
        return grad, None


class InertHook:
    """The stand-in for a hook in a copied model."""

    def __call__(self, *_: Any) -> None:
        return None
