"""The steps of a run around one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lipcore.metric.window import Window
from lipcore.report.source import Block, Happened, SamplesOfStep, Source, Started

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
    for block in run.blocks(quantity, first, last):
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


class Around:
    """Part of a run between two steps, as a run of its own: what a page about it is made of."""

    def __init__(self, run: Source, first: int, last: int) -> None:
        self._run = run
        self.first_step, self.last_step = first, last

    @property
    def path(self) -> Path:
        return self._run.path

    @property
    def name(self) -> str:
        return self._run.name

    @property
    def being_written(self) -> bool:
        return self._run.being_written

    @property
    def starts(self) -> Sequence[Started]:
        return self._run.starts

    @property
    def events(self) -> Sequence[Happened]:
        return [event for event in self._run.events if self.first_step <= event.step <= self.last_step]

    @property
    def last_wall(self) -> float:
        return self._run.last_wall

    @property
    def step_quantities(self) -> Sequence[str]:
        return self._run.step_quantities

    def blocks(self, quantity: str, first: int = 1, last: int | None = None) -> Iterator[Block]:
        """Yield the steps of a quantity between the two."""
        end = self.last_step if last is None else min(last, self.last_step)
        for block in self._run.blocks(quantity, max(first, self.first_step), end):
            inside = (block.steps >= self.first_step) & (block.steps <= self.last_step)
            if inside.all():
                yield block
            elif inside.any():
                values, low, high = (array[inside] for array in (block.values, block.low, block.high))
                three = (values, values, values) if block.low is block.values else (values, low, high)
                yield Block(block.steps[inside], block.places, block.levels, *three)

    def each_window(self) -> Iterator[Window]:
        """Yield none: windows are of more steps than these."""
        yield from ()

    def batches(self, first: int = 1, last: int | None = None) -> Sequence[SamplesOfStep]:
        """Return the samples of the steps between the two."""
        return self._run.batches(max(first, self.first_step), self.last_step if last is None else last)

    def as_of_now(self) -> AbstractContextManager[None]:
        """Read the file as it is now."""
        return self._run.as_of_now()
