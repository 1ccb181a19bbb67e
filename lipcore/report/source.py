"""What a report reads of a recorded run; :class:`lipcore.recording.Run` is such a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lipcore.metric.window import Window

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Block:
    """Some consecutive steps of one quantity, [k, places]; NaN where there is no number.

    Attributes:
        steps: int64 [k].
        places, levels: what the columns are of.
        values: of single steps, or means of 64 where older steps were folded.
        low, high: least and greatest value of the steps that a row stands for.
    """

    steps: np.ndarray[Any, np.dtype[np.int64]]
    places: Sequence[str]
    levels: Sequence[str]
    values: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepTime:
    """Time of some steps.

    Attributes:
        steps: how many.
        inside: seconds inside lipcore's calls at their ends: the median of each 64 steps, times their number.
        usual: seconds from step to step, likewise.
    """

    steps: int = 0
    inside: float = 0.0
    usual: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(self.steps + other.steps, self.inside + other.inside, self.usual + other.usual)


class Started(Protocol):
    """One beginning of a run's recording."""

    @property
    def kind(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def wall(self) -> float: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


class Happened(Protocol):
    """One event of a run."""

    @property
    def step(self) -> int: ...
    @property
    def wall(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def data(self) -> Mapping[str, Any]: ...


class SamplesOfStep(Protocol):
    """Samples of one step; None what was not recorded."""

    @property
    def step(self) -> int: ...
    @property
    def ids(self) -> np.ndarray[Any, np.dtype[np.int64]] | None: ...
    @property
    def norms(self) -> np.ndarray[Any, np.dtype[np.float32]] | None: ...
    @property
    def losses(self) -> np.ndarray[Any, np.dtype[np.float32]] | None: ...
    @property
    def rng_state(self) -> bytes | None: ...
    @property
    def doubt(self) -> str: ...


class Source(Protocol):
    """A recorded run."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def being_written(self) -> bool: ...
    @property
    def was_cut_off(self) -> bool: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def ranks(self) -> Sequence[int]: ...
    @property
    def starts(self) -> Sequence[Started]: ...
    @property
    def events(self) -> Sequence[Happened]: ...
    @property
    def first_step(self) -> int: ...
    @property
    def last_step(self) -> int: ...
    @property
    def last_wall(self) -> float: ...
    @property
    def step_time(self) -> StepTime: ...
    @property
    def step_quantities(self) -> Sequence[str]: ...
    def blocks(self, quantity: str, first: int = 1, last: int | None = None) -> Iterator[Block]: ...
    def batches(self, first: int = 1, last: int | None = None) -> Sequence[SamplesOfStep]: ...
    def each_window(self) -> Iterator[Window]: ...
    def as_of_now(self) -> AbstractContextManager[None]: ...
    def of_rank(self, rank: int) -> Source | None: ...
    def close(self) -> None: ...
