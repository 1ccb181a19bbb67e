"""What is usual: the last quiet values of every column, and scores against them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Quiet steps that a value is compared with; there is no score before there are so many.
STEPS = 100
_NOISE = 0.01  # added to the spread: a series that hardly varies does not alarm at one percent


class Baseline:
    """Baseline of the last 100 quiet values of some columns.

    A column's score is z = (x - median) / (1.4826 MAD + 0.01), of logarithms x; the step that is scored is not among
    the values. NaN is no value.
    """

    def __init__(self, columns: int) -> None:
        self._values = np.full((columns, STEPS), np.nan)
        self._counts = np.zeros(columns, np.int64)
        self.medians = np.full(columns, np.nan)  #: as of the last score

    def scores(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the scores; NaN for a column that is NaN or has fewer than 100 values."""
        z = np.full(len(x), np.nan)
        full = self._counts >= STEPS
        if full.any():
            values = self._values if full.all() else self._values[full]
            medians = _medians(values)
            spread = 1.4826 * _medians(np.abs(values - medians[:, None])) + _NOISE
            self.medians[full] = medians
            z[full] = (x[full] - medians) / spread
        return z

    def take(self, x: NDArray[np.float64], quiet: NDArray[np.bool_]) -> None:
        """Take the quiet columns' values in, over the oldest ones."""
        where = np.flatnonzero(quiet & ~np.isnan(x))
        self._values[where, self._counts[where] % STEPS] = x[where]
        self._counts[where] += 1


def _medians(values: NDArray[np.float64]) -> NDArray[np.float64]:
    middle = STEPS // 2
    return np.asarray(np.partition(values, (middle - 1, middle), axis=1)[:, middle - 1 : middle + 1].mean(axis=1))
