"""Curves of several runs over a common axis: steps, something that was logged, or the training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts

Array = np.ndarray[Any, Any]
LOSS = "logged/loss"
_SMOOTHED = 100  # stretches of a run over whose means the loss is followed


@dataclass(frozen=True)
class Curve:
    """Numbers of one run over an axis, in the order of training."""

    x: Array
    y: Array
    steps: Array  #: of the numbers

    def at(self, x: float) -> float:
        """Return the number where a falling axis first comes down to a value; NaN where it does not."""
        where = np.flatnonzero(self.x <= x)
        return float(self.y[where[0]]) if len(where) else np.nan

    def step_at(self, x: float) -> int | None:
        """Return the step there."""
        where = np.flatnonzero(self.x <= x)
        return int(self.steps[where[0]]) if len(where) else None


def curve(facts: Facts, numbers: Binned, column: int, by: str) -> Curve | None:
    """Return a quantity of a run over an axis; None where the run does not have both.

    By loss, it is taken at the steps where the training loss, as a mean over a hundredth of the run, first came down to
    a value: at equal loss, runs of different speed can be compared.

    Args:
        numbers, column: the quantity.
        by: "step", "loss", or a name that was logged and only grows.

    Raises:
        ValueError: what was logged under this name does not grow.
    """
    there = np.flatnonzero(numbers.count[:, column] > 0)
    steps, y = numbers.ends[there], numbers.means_of(column)[there]
    if by == "step":
        return Curve(steps, y, steps) if len(steps) else None
    axis = facts.lines.get(f"logged/{by}")
    if axis is None or not axis.count[:, 0].any() or not len(steps):
        return None
    at = np.flatnonzero(axis.count[:, 0] > 0)
    ends, values = axis.ends[at], axis.means_of(0)[at]
    if by != "loss":
        if (np.diff(values) < 0).any():
            raise ValueError(f"by: {by!r} does not only grow in the run {facts.name}; choose step, loss, or what does")
        return Curve(np.interp(steps, ends, values), y, steps)
    values = _smoothed(values)
    x = np.interp(steps, ends, values)
    y = _smoothed(y) if len(y) > _SMOOTHED else y
    lowest = np.minimum.accumulate(x)
    new = np.append(True, lowest[1:] < lowest[:-1])
    return Curve(x[new], y[new], steps[new])


def _smoothed(values: Array) -> Array:
    """Return means over a hundredth of the numbers that went before."""
    width = max(1, len(values) // _SMOOTHED)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    begin = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    end = np.arange(1, len(values) + 1)
    found: Array = (sums[end] - sums[begin]) / (end - begin)
    return found
