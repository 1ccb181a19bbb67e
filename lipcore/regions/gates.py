"""Which linear piece every unit of an activation is on, for the activations whose pieces are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: step: slope 0 or 1, one bit. leaky: slope a or 1, one bit. bend: as step, with a second bit for the upper flat piece.
#: index: which element of a pooling window was the largest.
Kind = Literal["step", "leaky", "bend", "index"]
KNOWN = "ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh, clamp, abs and max pooling"


@dataclass(frozen=True)
class Gate:
    """One activation's pattern for a batch."""

    name: str
    kind: Kind
    slope: Tensor  #: bool [B, n], or int [B, n] for kind "index"
    above: Tensor | None = None  #: bool [B, n], on the upper flat piece


@dataclass(frozen=True)
class Pieces:
    """A Gate without a name, in the shape of the activation's input."""

    kind: Kind
    slope: Tensor
    above: Tensor | None = None


def pieces_of(op: str, given: dict[str, Any]) -> Pieces | None:
    """Of an activation's input, by the arguments of the call; None where the op is no activation of known pieces."""
    x = given.get("self")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if op == "relu":
        return Pieces("step", x > 0)
    if op == "threshold":
        return Pieces("step", x > given["threshold"]) if given["value"] == 0 else None
    if op in ("leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise", "abs"):
        return Pieces("leaky", x > 0)
    if op in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        low, high = (given.get(f"{side}_val", given.get(side)) for side in ("min", "max"))
        inside = torch.ones_like(x, dtype=torch.bool)
        if low is not None:
            inside &= x > low
        if high is None:
            return Pieces("step", inside)
        return Pieces("bend", inside & (x < high), x >= high)
    return None


def is_max_pooling(op: str) -> bool:
    return op.startswith(("max_pool", "adaptive_max_pool", "fractional_max_pool"))
