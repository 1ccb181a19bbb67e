"""The two autograd Functions that pass an output on unchanged, to get at its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.capture.site import Site


class Probed(torch.autograd.Function):
    """Gives the probe, a fresh leaf, the reduced gradient as its own: a pure function that can be traced."""

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
    """For an output that requires no gradient, behind a frozen first layer: the anchor requires one, so that it is
    computed."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, in_place_after: bool) -> Tensor:
        return passed_on(ctx, output, in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return None, None, None


def passed_on(ctx: Any, output: Tensor, in_place_after: bool) -> Tensor:
    if in_place_after:
        # A view would make the in-place activation that may follow an error. This bumps the version counter, so it is
        # only right behind a module that does not need its output for its own backward. A compiler removes the copy;
        # what it makes of a view that was marked is wrong once sizes are symbols.
        if torch.compiler.is_compiling() or (output._is_view() and type(output) is not Tensor):
            return output.clone()
        if output._is_view():
            # The same memory, but no view in autograd's eyes: what mark_dirty makes of a tensor that is none. Linears
            # of three dimensions return views; copies of them would be a fifth of a transformer's memory.
            alias = output.new_empty(0)
            return alias.set_(output.untyped_storage(), output.storage_offset(), output.shape, output.stride())
        ctx.mark_dirty(output)
        return output
    return output.view_as(output)
