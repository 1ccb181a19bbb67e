"""Curves of several runs over a common axis: steps, something that was logged, or the training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.theory.falling import first_at, smoothed

Array = np.ndarray[Any, Any]
LOSS = "logged/loss"


@dataclass(frozen=True)
class Curve:
    """Numbers of one run over an axis, in the order of training."""

    x: Array
    y: Array
    steps: Array  #: of the numbers

    def at(self, x: float) -> float:
        """Return the number where a falling axis first comes down to a value; NaN where it does not."""
        where = first_at(self.x, x)
        return np.nan if where is None else float(self.y[where])

    def step_at(self, x: float) -> int | None:
        """Return the step there."""
        where = first_at(self.x, x)
        return None if where is None else int(self.steps[where])


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
    values = smoothed(values)
    x = np.interp(steps, ends, values)
    y = smoothed(y)
    lowest = np.minimum.accumulate(x)
    new = np.append(True, lowest[1:] < lowest[:-1])
    return Curve(x[new], y[new], steps[new])
