"""Numbers of all ranks together, of which some are added up, and of others the largest is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """What one rank adds to a merged window: float64 tensors on the CPU, of the same shapes on all ranks.

    Attributes:
        sums: to be added up; or a function that makes them of the maxima over all ranks, which may say their shapes.
        largest: of which the maxima are wanted.
    """

    sums: list[Tensor] | Callable[[list[Tensor]], list[Tensor]]
    largest: list[Tensor]


@dataclass
class Together:
    """What :class:`Packed` of all ranks comes to."""

    sums: list[Tensor]
    largest: list[Tensor]


def folded(parts: Callable[[], Iterable[Packed]]) -> Together:
    """Return what the parts of so many ranks come to, without ranks: one part after the other, so that
    memory does not grow with their number.

    Args:
        parts: gives them, alike; called twice where sums are made of maxima.
    """
    largest: list[Tensor] | None = None
    sums: list[Tensor] | None = None
    later = False  # some of the sums are made of the maxima
    for part in parts():
        largest = _with(largest, part.largest, torch.maximum)
        later |= callable(part.sums)
        if not callable(part.sums):
            sums = _with(sums, part.sums, torch.add)
    for part in parts() if later else ():
        sums = _with(sums, part.sums(largest or []) if callable(part.sums) else [], torch.add)
    return Together(sums or [], largest or [])


def _with(so_far: list[Tensor] | None, more: Sequence[Tensor], operation: Callable[..., Tensor]) -> list[Tensor]:
    if so_far is None:
        return [tensor.clone() for tensor in more]
    for into, tensor in zip(so_far, more, strict=True):
        operation(into, tensor, out=into)
    return so_far
