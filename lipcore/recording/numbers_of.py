"""What experiment loggers get of a window: numbers by name."""

from __future__ import annotations

import numpy as np

from lipcore.metric.columns import Column
from lipcore.metric.results import Window

#: Reducers that loggers get; of a quantity that has none of them, all that it has.
_USUAL = ("mean", "max")


def numbers_of(window: Window) -> dict[str, float]:
    """Return a window's totals and groups, finite and valid numbers alone, as
    ``{"lipcore/trajectory/update_norm.mean/layers.0": 0.013}``: the same names whatever the number of ranks."""
    found: dict[str, float] = {}
    for metric, result in window.results.items():
        for quantity, values in result.items():
            for part in values.parts:
                wanted = [name for name in part.reducers if name in _USUAL] or list(part.reducers)
                where = [i for i, level in enumerate(part.places.levels) if level != "tensor"]
                for reducer in wanted:
                    numbers = _shown(part.reducers[reducer], len(part.places))
                    found |= {
                        f"lipcore/{metric}/{quantity}.{reducer}/{part.places.names[i]}": float(numbers[i])
                        for i in where
                        if np.isfinite(numbers[i])
                    }
    return found


def _shown(column: Column, places: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return a column's numbers, NaN where they are not valid."""
    return np.where(np.broadcast_to(np.asarray(column.valid), (places,)), column.array(places), np.nan)
