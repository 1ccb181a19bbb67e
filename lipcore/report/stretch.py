"""Consecutive single steps of a quantity as one array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lipcore.report.left_out import LeftOut
from lipcore.report.source import Source

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stretch:
    """Numbers of one quantity in consecutive steps.

    Attributes:
        steps: int64 [k], all steps from the first to the last.
        places, levels: what the columns are of.
        values: float64 [k, places]; NaN where there is no number.
        there: [k]: the step is in the record, one by one.
        folded: some of the steps are there only as least, mean and greatest value of 64.
    """

    steps: Array
    places: list[str]
    levels: list[str]
    values: Array
    there: Array
    folded: bool

    def at(self, *levels: str) -> list[int]:
        """Return the columns of the places of some levels."""
        return [i for i, level in enumerate(self.levels) if level in levels]

    def row(self, step: int) -> int:
        """Return the row of a step."""
        return step - int(self.steps[0])


def stretch(run: Source, quantity: str, first: int, last: int) -> Stretch:
    """Read the single steps of a quantity between two steps, both included."""
    columns: dict[str, int] = {}
    levels: list[str] = []
    pieces: list[tuple[Array, list[int], Array]] = []
    folded = False
    for block in LeftOut.of(run, first, last).blocks(run, quantity, first, last):
        inside = (block.steps >= first) & (block.steps <= last)
        if block.low is not block.values:
            folded |= bool(inside.any()) or bool(len(block.steps) and block.steps[-1] > last)
            continue
        for place, level in zip(block.places, block.levels, strict=True):
            if place not in columns:
                columns[place] = len(columns)
                levels.append(level)
        where = [columns[place] for place in block.places]
        pieces.append((block.steps[inside], where, np.asarray(block.values, np.float64)[inside]))
    steps = np.arange(first, last + 1)
    values, there = np.full((len(steps), len(columns)), np.nan), np.zeros(len(steps), bool)
    for own, where, numbers in pieces:
        values[np.ix_(own - first, np.array(where, np.int64))] = numbers
        there[own - first] = True
    return Stretch(steps, list(columns), levels, values, there, folded)
