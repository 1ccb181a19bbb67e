"""Numbers that are 0: an update or a gradient of nothing, which has no logarithm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MEMORY = 1000  # steps


class Still:
    """Finder of the columns whose 0 is no news.

    A layer that has always moved and does not is told. One to which no sample comes now and then (an expert), or whose
    updates are below the resolution of its dtype, has been still before: its 0 is no number to compare others with, and
    none to be compared.
    """

    def __init__(self, columns: int) -> None:
        self._last = np.full(columns, -_MEMORY - 1)  # step in which each was last 0, after it had moved
        self._moved = np.zeros(columns, bool)
        self._all_moved = False

    def usual(self, step: int, still: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which of the columns that are 0 in a step were so in the 1000 steps before, or have never moved; take
        the step in, with the columns of which anything is known."""
        if not self._all_moved:
            self._moved |= known & ~still
            self._all_moved = bool(self._moved.all())
        if not still.any():
            return still
        usual = still & (~self._moved | (step - self._last <= _MEMORY))
        self._last[still & self._moved] = step
        return usual
