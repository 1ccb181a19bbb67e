"""Series of closed windows: one per metric, quantity and reducer, all found in one pass over the windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from lipcore.metric.results import Window
from lipcore.recording.series import Series, matching


@dataclass
class _Numbers:
    """What windows say of one quantity: the columns of its places, and numbers by column for the windows that have
    it, by their place among all windows."""

    columns: dict[str, int] = field(default_factory=dict)
    rows: dict[int, dict[int, float]] = field(default_factory=dict)


def series_of(
    windows: Iterable[Window], wanted: Callable[[str, str], bool], pattern: str = "*"
) -> dict[tuple[str, str], Series]:
    """Return the series of windows by metric and `quantity.reducer`, in the order in which they come up; NaN where a
    window has no number.

    Args:
        windows: oldest first.
        wanted: of a metric and a `quantity.reducer`, whether it is asked for.
        pattern: of places, as of file names.
    """
    found: dict[tuple[str, str], _Numbers] = {}
    steps: list[int] = []
    for at, window in enumerate(windows):
        steps.append(window.last_step)
        for metric, result in window.results.items():
            for quantity, values in result.items():
                for part in values.parts:
                    for reducer, column in part.reducers.items():
                        if not wanted(metric, f"{quantity}.{reducer}"):
                            continue
                        one = found.setdefault((metric, f"{quantity}.{reducer}"), _Numbers())
                        names = list(part.places.names)
                        array, row = column.array(len(names)), one.rows.setdefault(at, {})
                        for i in matching(names, pattern):
                            row[one.columns.setdefault(names[i], len(one.columns))] = float(array[i])
    numbers = np.array(steps, np.int64)
    return {key: _as_series(key[1], numbers, one) for key, one in found.items()}


def _as_series(name: str, steps: np.ndarray, one: _Numbers) -> Series:
    values = np.full((len(steps), len(one.columns)), np.nan)
    for at, row in one.rows.items():
        for column, number in row.items():
            values[at, column] = number
    return Series(name, steps, values, list(one.columns), values, values)
