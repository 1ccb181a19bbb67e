"""Long series in few bins of steps, each with least, mean and greatest value: no point is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_NEVER = np.iinfo(np.int64).max


class Binned:
    """Numbers of some places in bins of equally many steps.

    Args:
        first, last: numbers of the first and the last step there is.
        most: number of bins at most.

    >>> binned = Binned(1, 6, most=3)
    >>> binned.add(np.arange(1, 7), ["a"], np.array([[1.0], [2], [3], [9], [np.nan], [5]]))
    >>> binned.width, binned.low[:, 0].tolist(), binned.mean[:, 0].tolist(), binned.high[:, 0].tolist()
    (2, [1.0, 3.0, 5.0], [1.5, 6.0, 5.0], [2.0, 9.0, 5.0])
    >>> binned.at_high[:, 0].tolist(), binned.not_finite.tolist()
    ([2, 4, 6], [1])
    """

    def __init__(self, first: int, last: int, most: int) -> None:
        steps = max(last - first + 1, 1)
        self.width = -(-steps // most)  #: steps of a bin
        self.first, self.last = first, max(last, first)
        self.bins = -(-steps // self.width)
        self.places: list[str] = []
        self.levels: list[str] = []
        self._index: dict[str, int] = {}
        self.low = np.empty((self.bins, 0))
        self.high = np.empty((self.bins, 0))
        self._sum = np.empty((self.bins, 0))
        self.count = np.empty((self.bins, 0), np.int64)  #: finite numbers
        self.at_high = np.empty((self.bins, 0), np.int64)  #: the step of the greatest one; -1 where there is none
        self.lost = np.empty((self.bins, 0), np.int64)  #: numbers that are NaN or infinite
        self.first_not_finite = np.empty(0, np.int64)  #: the first step of these, -1 where there is none

    @property
    def mean(self) -> Array:
        """Mean of the finite numbers of each bin, [bins, places]; NaN where there is none."""
        return np.where(self.count > 0, self._sum / np.maximum(self.count, 1), np.nan)

    def means_of(self, column: int) -> Array:
        """Return :attr:`mean` of one place, [bins]."""
        count = self.count[:, column]
        return np.where(count > 0, self._sum[:, column] / np.maximum(count, 1), np.nan)

    @property
    def not_finite(self) -> Array:
        """Counts of the numbers of each place that are NaN or infinite."""
        return np.asarray(self.lost.sum(0))

    @property
    def ends(self) -> Array:
        """The last step of each bin."""
        return np.minimum(self.first - 1 + self.width * np.arange(1, self.bins + 1), self.last)

    def where(self, *levels: str) -> list[int]:
        """Return the columns of the places of some levels."""
        return [i for i, level in enumerate(self.levels) if level in levels]

    def add(
        self,
        steps: Array,
        places: Sequence[str],
        values: Array,
        low: Array | None = None,
        high: Array | None = None,
        levels: Sequence[str] | None = None,
    ) -> None:
        """Take rows in: `steps` ascending, the others [steps, places]."""
        if not len(steps) or not len(places):
            return
        columns = self._columns(places, levels or ["total"] * len(places))
        values = np.asarray(values, np.float64)
        finite = np.isfinite(values)
        values = np.where(finite, values, np.nan)
        lows = values if low is None else np.where(np.isfinite(low), low, np.nan)
        highs = values if high is None else np.where(np.isfinite(high), high, np.nan)
        bins = (steps - self.first) // self.width
        self._note_first_lost(steps, columns, ~finite)
        starts = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1))
        at = np.ix_(bins[starts], np.array(columns))
        greatest = np.fmax.reduceat(highs, starts, axis=0)
        spread = np.repeat(greatest, np.diff(starts, append=len(steps)), axis=0)
        where = np.minimum.reduceat(np.where(highs == spread, steps[:, None], _NEVER), starts, axis=0)
        new = (greatest > self.high[at]) | np.isnan(self.high[at])
        self.at_high[at] = np.where(new & (where != _NEVER), where, self.at_high[at])
        self.high[at] = np.fmax(self.high[at], greatest)
        self.low[at] = np.fmin(self.low[at], np.fmin.reduceat(lows, starts, axis=0))
        self._sum[at] += np.add.reduceat(np.where(finite, values, 0.0), starts, axis=0)
        self.lost[at] += np.add.reduceat((~finite).astype(np.int64), starts, axis=0)
        self.count[at] += np.add.reduceat(finite.astype(np.int64), starts, axis=0)

    def forgive(self, steps: Array, places: Sequence[str], where: Array) -> None:
        """Count numbers that were added, [steps, places], as none, where they are not finite for lack of one."""
        if where.any():
            columns = np.array(self._columns(places, ["total"] * len(places)))
            bins = (steps - self.first) // self.width
            np.subtract.at(self.lost, (bins[:, None], columns[None, :]), where.astype(np.int64))

    def _columns(self, places: Sequence[str], levels: Sequence[str]) -> list[int]:
        unknown = [i for i, place in enumerate(places) if place not in self._index]
        for i in unknown:
            self._index[places[i]] = len(self.places)
            self.places.append(places[i])
            self.levels.append(levels[i])
        if unknown:
            wide = ((0, 0), (0, len(unknown)))
            self.low, self.high = (np.pad(array, wide, constant_values=np.nan) for array in (self.low, self.high))
            self._sum, self.count, self.lost = (
                np.pad(self._sum, wide),
                np.pad(self.count, wide),
                np.pad(self.lost, wide),
            )
            self.at_high = np.pad(self.at_high, wide, constant_values=-1)
            self.first_not_finite = np.pad(self.first_not_finite, (0, len(unknown)), constant_values=-1)
        return [self._index[place] for place in places]

    def _note_first_lost(self, steps: Array, columns: list[int], lost: Array) -> None:
        if not lost.any():
            return
        before = self.first_not_finite[columns]
        here = np.where(lost.any(0), steps[lost.argmax(0)], -1)
        self.first_not_finite[columns] = np.where(before >= 0, before, here)

    # ---- one place over the whole run

    def span(self, column: int) -> tuple[float, float, float]:
        """Return least value, mean of the bins' means, and greatest value of a place; NaN where there is none."""
        if not self.count[:, column].any():
            return np.nan, np.nan, np.nan
        means = self.means_of(column)
        return (
            float(np.nanmin(self.low[:, column])),
            float(np.nanmean(means)),
            float(np.nanmax(self.high[:, column])),
        )

    def step_of_greatest(self, column: int) -> int:
        """Return the step of a place's greatest value, -1 where there is none."""
        if not self.count[:, column].any():
            return -1
        return int(self.at_high[int(np.nanargmax(self.high[:, column])), column])

    def usual(self, column: int) -> float:
        """Return the median of the bins' means of a place, NaN where there is none."""
        means = self.means_of(column)
        means = means[np.isfinite(means)]
        return float(np.median(means)) if len(means) else np.nan

    def first_and_last(self, column: int) -> tuple[float, float]:
        """Return the first and the last number of a place, NaN where there is none."""
        means = self.means_of(column)
        means = means[np.isfinite(means)]
        return (float(means[0]), float(means[-1])) if len(means) else (np.nan, np.nan)
