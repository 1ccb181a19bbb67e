"""The gradient at the model's own output, which normalised norms are divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def tap_output(output: Any, samples: int, keep: Callable[[Tensor], None]) -> Tensor | None:
    """Return the model's output anew, with its gradient's squares, float64 [B], going to `keep`; return None where the
    output has no gradient.

    Raises:
        ValueError: the output is not a tensor with one number per sample.
    """
    if not isinstance(output, Tensor):
        raise ValueError(f"model: normalized=True needs an output that is a tensor, got {type(output).__name__}")
    if not output.requires_grad:
        return None
    if output.numel() != samples:
        raise ValueError(
            f"model: normalized=True needs one output per sample, {samples} of them; the output has shape "
            f"{list(output.shape)}"
        )
    tapped = output.view_as(output)
    tapped.register_hook(lambda grad: keep(grad.detach().reshape(-1).double().square()))
    return tapped
