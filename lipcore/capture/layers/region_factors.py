"""The way of factors out of a compiled region: an operator that is called in its backward pass, and hands them over.

Squares leave a region as the gradient of a probe. The squares of two uses of one parameter say nothing of the square of
their sum, so for a parameter that several layers share, or whose layer is called several times, the operator hands over
what both are made of; it is joined outside. To the compiler it is an operator that gives one more row of the probe.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lipcore.functional import library


class Receiver(Protocol):
    """A tapped layer that takes what the operator hands over."""

    number: int

    def factors_came_back(self, grad: Tensor, saved: Sequence[Tensor], probe: Tensor) -> Tensor | None:
        """Take in the gradient at the output and what the rule has saved; return rows [rows, B] for the probe, or
        None."""


_receivers: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()


def register(receiver: Receiver) -> None:
    """Let the operator find a layer by its number."""
    _receivers[receiver.number] = receiver


def hand_over(grad: Tensor, saved: Sequence[Tensor], probe: Tensor, number: int, rows: int) -> Tensor:
    """Return rows of a probe's gradient, float64 [rows, B], when the layer of this number has got its factors."""
    found: Tensor = torch.ops.lipcore.hand_over_factors(grad, list(saved), probe, number, rows)
    return found


def _hand_over(grad: Tensor, saved: list[Tensor], probe: Tensor, number: int, rows: int) -> Tensor:
    receiver = _receivers.get(number)
    found = None if receiver is None else receiver.factors_came_back(grad, saved, probe)
    return probe.new_zeros(rows, probe.shape[1]) if found is None else found


library.register(
    "hand_over_factors(Tensor grad, Tensor[] saved, Tensor probe, int number, int rows) -> Tensor",
    _hand_over,
    lambda grad, saved, probe, number, rows: probe.new_empty(rows, probe.shape[1]),
)
