"""Outputs of a layer beside its first, such as attention weights: a rule does not know the gradients they bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def watch(output: Any, on_gradient: Callable[[], None]) -> None:
    """Call `on_gradient` when a gradient comes back to one of a layer's outputs beside the first."""

    def came(grad: Tensor) -> None:
        on_gradient()

    for other in _others(output):
        other.register_hook(came)


def watch_probed(output: Any, probe: Tensor) -> Any:
    """Return a layer's output, inside a compiled region, with the tensors beside the first watched: a gradient at one
    of them makes the probe's gradient NaN."""
    others = {id(other) for other in _others(output)}
    if not others:
        return output
    return tuple(_Watched.apply(t, probe) if id(t) in others else t for t in output)  # type: ignore[no-untyped-call]


def _others(output: Any) -> list[Tensor]:
    rest = output[1:] if isinstance(output, tuple) else ()
    return [t for t in rest if isinstance(t, Tensor) and t.requires_grad]


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor) -> Tensor:
        ctx.columns = probe.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # A compiled region has a gradient for each of its outputs, of zeros where there is none.
        reached = (grad != 0).any()
        mark = torch.where(reached, torch.nan, 0.0).to(torch.float64)
        return grad, mark.expand(ctx.columns)
