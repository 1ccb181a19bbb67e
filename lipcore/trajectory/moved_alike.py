"""Whether ranks that hold the same parameters have moved them by the same steps: else there is no movement of the
model, and that of the one rank that counts it would stand for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_APART = 1e-6  # of the sum of squares: the last digits of float32 updates may differ where ranks have other processors
_SAID = (
    "trajectory: ranks that hold the same parameters have moved them by other steps (squared updates of this window "
    "add up to {0:.6g} on one rank and {1:.6g} on another), so that there is no movement of the model: they train "
    "apart, and average weights now and then (local SGD, DiLoCo), or one of them has skipped steps. Each rank's own "
    "numbers are in pop_window() and history; pass group=None, or average gradients"
)


def movement(steps: Tensor, columns: Sequence[int]) -> Tensor:
    """Return what a rank adds to the maxima of all: the sum of the squared updates in these columns, and its negation.

    Args:
        steps: [steps, columns, 2], squared norms of update and weight.
        columns: of parameters that every rank holds whole; none: this rank has nothing to say.
    """
    if not len(columns) or not len(steps):
        return steps.new_full((2,), -torch.inf)
    moved = steps[:, list(columns), 0].nan_to_num(0.0, 0.0, 0.0).sum()
    return torch.stack([moved, -moved])


def check_moved_alike(largest: Tensor) -> None:
    """Raise ValueError, on all ranks alike, where the maxima of all ranks say that they have moved by other steps."""
    most, least = largest[0].item(), -largest[1].item()
    if most - least > _APART * most:
        raise ValueError(_SAID.format(least, most))
