"""Part of a run, around one of its steps, as a run of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from lipcore.metric.window import Window
from lipcore.report.source import Block, Happened, SamplesOfStep, Source, Started, StepTime


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
    def was_cut_off(self) -> bool:
        return self._run.was_cut_off

    @property
    def rank(self) -> int | None:
        return self._run.rank

    @property
    def ranks(self) -> Sequence[int]:
        return self._run.ranks

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
    def step_time(self) -> StepTime:
        return self._run.step_time

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

    def of_rank(self, rank: int) -> Source | None:
        """Return the whole record of another rank."""
        return self._run.of_rank(rank)

    def close(self) -> None:
        """Leave the run open: it is somebody else's."""
