"""Series: one quantity of a run over steps, in some places."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from lipcore.metric.show import Showable, Shown
from lipcore.models.names import listed

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Series(Showable):
    """One quantity of a run over steps, in some places.

    Attributes:
        name: of the quantity: "update_norm", or with a reducer where it is of windows: "update_norm.mean".
        steps: int64 [k]: each value's step; of windows, and of steps that were folded, the last one.
        values: float64 [k, places]; NaN where there is none.
        places: names of the columns.
        low, high: least and greatest value of the steps that one stands for, [k, places]; the same as `values` but
            where older steps were folded.
    """

    name: str
    steps: np.ndarray[Any, np.dtype[np.int64]]
    values: np.ndarray[Any, np.dtype[np.float64]]
    places: list[str]
    low: np.ndarray[Any, np.dtype[np.float64]]
    high: np.ndarray[Any, np.dtype[np.float64]]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the values in one place, [k]."""
        if place not in self.places:
            raise KeyError(f"{self.name} has no place {place!r} here; it has {listed(self.places)}")
        column: np.ndarray[Any, np.dtype[np.float64]] = self.values[:, self.places.index(place)]
        return column

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row per step and a column per place; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.values, index=pandas.Index(self.steps, name="step"), columns=self.places)

    def _shown(self) -> Shown:
        rows = []
        for i, place in enumerate(self.places):
            last = self.values[-1, i] if len(self) else np.nan
            rows.append((place, f"first {self.values[0, i]:.4g}  last {last:.4g}" if len(self) else "", ""))
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if len(self) else "no steps"
        return Shown(f"{self.name}: {len(self)} values in {len(self.places)} places, {span}", rows)


def matching(places: list[str], pattern: str) -> list[int]:
    """Return the positions of the places that fit a pattern as file names have them: "layers.*"."""
    if pattern in places:  # names may have brackets
        return [places.index(pattern)]
    return [i for i, place in enumerate(places) if fnmatchcase(place, pattern)]
