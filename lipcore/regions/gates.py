"""The linear piece on which every unit of an activation is, for the activations whose pieces are known.

On a border a unit is on the piece whose slope torch takes there, so that the pattern always is that of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: step: slope 0 or 1, one bit. leaky: slope a or 1, one bit. bend: as step, with a second bit for the upper flat piece.
#: fold: slope -1 or 1, with a second bit for 0, the slope of abs at 0. index: which element of a pooling window was the
#: largest.
Kind = Literal["step", "leaky", "bend", "fold", "index"]
KNOWN = "ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh, clamp, abs and max pooling"


@dataclass(frozen=True)
class Gate:
    """Pattern of one activation for a batch."""

    name: str
    kind: Kind
    slope: Tensor  #: bool [B, n], or int [B, n] for kind "index"
    second: Tensor | None = None  #: bool [B, n], of kinds "bend" and "fold"
    in_module: bool = True  #: not in the model's own forward, nor in a callable output


@dataclass(frozen=True)
class Pieces:
    """Gate without a name, in the shape of the activation's input."""

    kind: Kind
    slope: Tensor
    second: Tensor | None = None


def pieces_of(op: str, given: dict[str, Any]) -> Pieces | None:
    """Find the pieces of an activation's input, by the arguments of the call; None where the operation is no
    activation of known pieces."""
    x = given.get("self")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if op == "relu":
        return Pieces("step", x > 0)
    if op == "threshold":
        return Pieces("step", x > given["threshold"]) if given["value"] == 0 else None
    if op in ("leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise"):
        return Pieces("leaky", x > 0)
    if op == "abs":
        return Pieces("fold", x > 0, x == 0)
    if op == "hardtanh":
        low, high = given["min_val"], given["max_val"]
        return Pieces("bend", (x > low) & (x < high), x >= high)
    if op in ("clamp", "clamp_min", "clamp_max"):
        low, high = given.get("min"), given.get("max")
        inside = torch.ones_like(x, dtype=torch.bool) if low is None else x >= low
        return Pieces("step", inside) if high is None else Pieces("bend", inside & (x <= high), x > high)
    return None


def is_max_pooling(op: str) -> bool:
    return op.startswith(("max_pool", "adaptive_max_pool", "fractional_max_pool"))
