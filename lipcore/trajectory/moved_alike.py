"""Whether ranks that hold the same parameters have moved them by the same steps, with the same gradients: else there is
no movement of the model, and the numbers of the one rank that counts them would stand for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipcore.metric.results import MetricResult
from lipcore.trajectory.gradient_norms import BEFORE

_APART = 1e-6  # of the sum of squares: the last digits of float32 updates may differ where ranks have other processors
# Gradients, beside that, where each of the ranks computes its own (what is outside a tensor-parallel plan).
_GRADIENTS_APART = 1e-4
_UNREDUCED = (
    "ranks that hold the same parameters had other gradients where these are read, so that there is none of the model "
    "(gradients that are reduced by hand, behind the backward pass); each rank's own numbers are in pop_window() and "
    "history. Reduce them in the backward pass (DistributedDataParallel, fully_shard())"
)
_READ_EARLY = ", or call observe_gradients() of the Trajectory behind your reduce"
_SAID = (
    "trajectory: ranks that hold the same parameters have moved them by other steps (squared updates of this window "
    "add up to {0:.6g} on one rank and {1:.6g} on another), so that there is no movement of the model: they train "
    "apart, and average weights now and then (local SGD, DiLoCo), or one of them has skipped steps. Each rank's own "
    "numbers are in pop_window() and history; pass group=None, or average gradients. Where each rank steps a part of "
    "the parameters and sends it to the others behind (ZeRO by hand), do both in step() of one object, and pass that "
    "as optimizer="
)


def movement(steps: Tensor, columns: Sequence[int]) -> Tensor:
    """Return what a rank adds to the maxima of all: the sum of the squared updates in these columns, and its negation.

    Args:
        steps: [steps, columns, 2], squared norms of update and weight.
        columns: of parameters that every rank holds whole; none: this rank has nothing to say.
    """
    return _most_and_least(steps[:, :, 0], columns)


def gradients_of(squares: Mapping[str, Tensor], columns: Sequence[int]) -> Tensor:
    """Return what a rank adds to the maxima of all: of each kind of gradients what :func:`movement` says of updates.

    Args:
        squares: [steps, columns], squared norms by kind.
        columns: of parameters that every rank holds whole.
    """
    found = [_most_and_least(squares[stage], columns) for stage in sorted(squares)]
    return torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64, device="cpu")


def _most_and_least(squares: Tensor, columns: Sequence[int]) -> Tensor:
    if not len(columns) or not len(squares):
        return squares.new_full((2,), -torch.inf)
    together = squares[:, list(columns)].nan_to_num(0.0, 0.0, 0.0).sum()
    return torch.stack([together, -together])


def check_moved_alike(largest: Tensor) -> None:
    """Raise ValueError, on all ranks alike, where the maxima of all ranks say that they have moved by other steps."""
    most, least = largest[0].item(), -largest[1].item()
    if most - least > _APART * most:
        raise ValueError(_SAID.format(least, most))


def without_unreduced(largest: Tensor, stages: Sequence[str], result: MetricResult) -> frozenset[str]:
    """Return the kinds of gradients that all ranks had alike, as the maxima of all ranks say; of others the result says
    why they are left out."""
    found = set()
    for stage, each in zip(sorted(stages), largest, strict=True):
        if why := unreduced(each):
            result.details[f"{stage}_off"] = why + (_READ_EARLY if stage == BEFORE else "")
        else:
            found.add(stage)
    return frozenset(found)


def unreduced(largest: Tensor) -> str:
    """Say, on all ranks alike, that they had other gradients, where the maxima of one kind say it; else ""."""
    most, less = largest.tolist()
    return _UNREDUCED if most + less > _GRADIENTS_APART * most else ""
