"""When a loss first comes down to a level: what comparisons at equal training loss have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_SMOOTHED = 100  # stretches of a run over whose means the loss is followed


def smoothed(values: Array) -> Array:
    """Return means over a hundredth of the numbers that went before, each with itself.

    >>> smoothed(np.arange(4.0)).tolist(), smoothed(np.arange(200.0))[:4].tolist()
    ([0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 1.5, 2.5])
    """
    width = len(values) // _SMOOTHED
    if width <= 1:
        return values
    sums = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    found: Array = (sums[end] - sums[begin]) / (end - begin)
    return found


def first_at(losses: Array, level: float) -> int | None:
    """Return the position of the first loss that is at most `level`, None where there is none."""
    where = np.flatnonzero(losses <= level)
    return int(where[0]) if len(where) else None
