"""Single steps that wait until what was logged of them has come too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lipcore.metric.values import Level
from lipcore.trajectory.step_stream import StepArrays

_MOST = 128  # steps that wait for what is logged: it comes in blocks of 64, or not any more
_RATES = 2048  # whose learning rates wait for any numbers: a device's ring holds 512 steps


@dataclass
class StepNumbers:
    """Numbers that are known of one step."""

    step: int
    norms: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  #: by quantity, [places]
    places: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()
    loss: float | None = None
    rate: float | None = None  #: logged as "lr"
    log_factor: float = 0.0  #: logarithm of the optimizers' common learning rate, in units of their first


class Waiting:
    """Queue of steps: norms and logged numbers come in blocks, each in its own time."""

    def __init__(self) -> None:
        self._steps: dict[int, StepNumbers] = {}
        self._newest = self._logged = self._done = 0
        self._log_factors: dict[int, float] = {}

    def begin_step(self, step: int, log_factor: float) -> None:
        """Take the learning rate of a step that is being made."""
        self._log_factors[step] = log_factor
        if len(self._log_factors) > _RATES:  # nothing brings numbers of these steps
            del self._log_factors[next(iter(self._log_factors))]

    def add_norms(self, first: int, arrays: StepArrays) -> None:
        """Take a Trajectory's numbers in."""
        places, levels = tuple(arrays.places), tuple(arrays.levels)
        for i in range(len(arrays["update_norm"])):
            one = self._of(first + i)
            one.norms = {name: array[i] for name, array in arrays.items()}
            one.places, one.levels = places, levels
            self._newest = max(self._newest, first + i)

    def add_logged(self, first: int, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Take what the loop has logged in."""
        for name, attribute in (("loss", "loss"), ("lr", "rate")):
            for i, number in enumerate(arrays.get(name, ())):
                setattr(self._of(first + i), attribute, float(number))
        self._logged = max(self._logged, *(first + len(array) - 1 for array in arrays.values()))

    def ready(self, *, logged_to: int | None, norms: bool, all_of_them: bool = False) -> Iterator[StepNumbers]:
        """Yield the steps that are complete, in order, each once: where the loop logs at all, those of which what it
        has logged is here; without norms those that were logged.

        Args:
            logged_to: of the steps up to this one everything that was logged is here, also where that is nothing; None
                where the loop logs nothing.
            norms: they come too.
            all_of_them: nothing more comes.
        """
        end = self._newest if norms else self._logged
        if all_of_them:
            end = max(self._newest, self._logged)
        elif logged_to is not None and norms:
            end = min(self._newest, max(self._logged, logged_to, self._newest - _MOST))
        for step in sorted(step for step in self._steps if step <= end):
            one = self._steps.pop(step)
            if step > self._done:
                self._done = step
                one.log_factor = self._log_factors.get(step, 0.0)
                yield one
        self._log_factors = {step: factor for step, factor in self._log_factors.items() if step > end}

    def forget(self, step: int) -> None:
        """Go on behind a step, without what waits."""
        self._steps, self._log_factors = {}, {}
        self._newest = self._logged = self._done = step

    def _of(self, step: int) -> StepNumbers:
        if step not in self._steps:
            self._steps[step] = StepNumbers(step)
        return self._steps[step]
