"""What is usual: the last quiet values of every column, and scores against them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Quiet steps that a value is compared with; there is no score before there are so many.
STEPS = 100
_HALF = STEPS // 2
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
            values = np.sort(self._values if full.all() else self._values[full], axis=1)
            medians, deviations = medians_and_deviations(values)
            self.medians[full] = medians
            z[full] = (x[full] - medians) / (1.4826 * deviations + _NOISE)
        return z

    def take(self, x: NDArray[np.float64], quiet: NDArray[np.bool_] | None = None) -> None:
        """Take the quiet columns' values in, or those of all, over the oldest ones."""
        known = ~np.isnan(x)
        where = np.flatnonzero(known if quiet is None else quiet & known)
        self._values[where, self._counts[where] % STEPS] = x[where]
        self._counts[where] += 1


def medians_and_deviations(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the medians of rows of 100 sorted values, and their median absolute deviations.

    Sorted, the deviations below the median are m - s[49], m - s[48], ..., those above it s[50] - m, s[51] - m, ... The
    51st smallest of both together is the least, over j, of the greater one of m - s[j] and s[50 + j] - m, and the 50th
    that of m - s[j] and s[49 + j] - m, with m - s[0] and s[99] - m: one look at each, where a second sort has many.
    """
    medians = (values[:, _HALF - 1] + values[:, _HALF]) / 2
    below, above = medians[:, None] - values[:, :_HALF], values[:, _HALF:] - medians[:, None]
    upper = np.maximum(below, above).min(1)
    lower = np.maximum(below[:, 1:], above[:, :-1]).min(1)
    lower = np.minimum(lower, np.minimum(below[:, 0], above[:, -1]))
    return medians, (lower + upper) / 2
