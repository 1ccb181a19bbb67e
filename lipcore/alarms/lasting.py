"""CUSUM: small changes that last, of which no single step is over the limit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ALLOWED = 0.5  # of the limit: what a step may be off without being counted
_ENOUGH = 5.0  # limits that must have gathered


class Lasting:
    """Cumulative sums of scores over half their limit, upwards and downwards: S = max(0, S + z / limit - 1/2), which
    alarm at 5.

    The baseline follows a steady trend, of which no score is over 1.35 in the long run (50 steps' change over 1.4826
    times 25 steps'): such a trend is not found.

    Args:
        two_sided: which columns alarm downwards too.
    """

    def __init__(self, two_sided: NDArray[np.bool_]) -> None:
        self._two_sided = two_sided
        self._up, self._down = np.zeros(len(two_sided)), np.zeros(len(two_sided))

    def observe(self, steps: NDArray[np.float64], quiet: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Take the scores of a step in, z / limit, 0 where there is none, and return how full each sum is, 1 where it
        alarms, negative downwards. What is not quiet empties its column's sums: its score has spoken already."""
        up, down = self._up, self._down
        up += steps
        up -= _ALLOWED
        down -= steps
        down -= _ALLOWED
        np.maximum(up, 0, out=up)
        np.maximum(down, 0, out=down)
        up *= quiet
        down *= quiet & self._two_sided
        return np.where(up >= down, up, -down) / _ENOUGH

    def clear(self, columns: NDArray[np.bool_]) -> None:
        """Empty the sums of some columns."""
        self._up[columns] = self._down[columns] = 0
