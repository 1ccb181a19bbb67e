"""What a step is held against: what is usual, what is finite, what the optimizer explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from lipcore.alarms.budget import Budget
from lipcore.alarms.detector import Columns, Detector
from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.layout import Layout
from lipcore.alarms.nonfinite import OF, NonFinite
from lipcore.alarms.signals import Signal
from lipcore.alarms.still import Still
from lipcore.alarms.unexplained import SIGNAL, UnexplainedMovement
from lipcore.alarms.waiting import StepNumbers
from lipcore.metric.columns import Where

_LEAST = 1e-30  # what does not move at all


class StepChecks:
    """The checks of single steps, each on its own: the detector's scores of all signals, and the exact ones.

    Args:
        signals: by name.
        budget: of the detector's alarms.
    """

    def __init__(self, signals: Mapping[str, Signal], budget: Budget) -> None:
        self._signals, self._budget = signals, budget
        self._layout: Layout | None = None
        self._detector: Detector | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the steps so far, whose numbers say nothing about the next ones: these are silent at first."""
        self._columns: Columns | None = None
        self._still = Still(0)
        self._nonfinite = NonFinite()
        limit = self._signals[SIGNAL].limit if SIGNAL in self._signals else None
        self._unexplained = None if limit is None else UnexplainedMovement(limit)

    def layout_of(self, one: StepNumbers) -> Layout:
        """Return where a step's numbers are of which place."""
        if self._layout is None or not self._layout.fits(one.places, one.levels):
            self._layout = Layout(self._signals, one.places, one.levels)
        return self._layout

    def alarms(self, one: StepNumbers, turns: Callable[[], int], *, rate_is_known: bool) -> Iterator[AlarmEvent]:
        """Return the alarms of a step, one by one.

        Args:
            one: its numbers.
            turns: in so many steps each parameter's movement is checked once.
            rate_is_known: the learning rate is the optimizers' own; else it is the one that was logged.
        """
        layout = self.layout_of(one)
        row = {name: one.norms[name][layout.single] for name in OF if name in one.norms}
        found = self._nonfinite.step(one.step, one.loss, row, layout.names)
        if found is not None:
            yield found
        if self._unexplained is not None and SIGNAL in one.norms:
            scores = one.norms[SIGNAL][layout.single]
            found = self._unexplained.step(one.step, scores, layout.names, turns())
            if found is not None:
                yield found
        if layout.columns.signals:
            found = self._score(one, layout, _log_rate(one, is_known=rate_is_known))
            if found is not None:
                yield found

    def _score(self, one: StepNumbers, layout: Layout, log_rate: float) -> AlarmEvent | None:
        columns = layout.columns
        if (one.norms and columns != self._columns) or self._detector is None or self._columns is None:
            self._columns = columns  # other places than before begin anew, with silent steps
            self._detector = Detector(columns, self._budget)
            self._still = Still(len(columns.signals))
        logs, still = self._logarithms(one, layout.groups, self._columns, log_rate)
        known = ~np.isnan(logs)
        logs[self._still.usual(one.step, still & known, known)] = np.nan
        return self._detector.step(one.step, logs, log_rate)

    def _logarithms(
        self, one: StepNumbers, groups: Where, columns: Columns, log_rate: float
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the logarithms of a step's numbers, NaN where there is none, and which of the numbers are 0."""
        logs, still = np.full(len(columns.signals), np.nan), np.zeros(len(columns.signals), bool)
        if one.loss is not None and one.loss > 0 and "loss" in self._signals:
            logs[columns.where("loss")] = math.log(one.loss) if math.isfinite(one.loss) else math.nan
        for name in ("update_norm", "grad_norm", "rms_t"):
            if name in self._signals and name in one.norms:
                numbers = one.norms[name][groups]
                numbers = np.where(np.isfinite(numbers), numbers, np.nan)
                logs[columns.where(name)] = np.log(np.maximum(numbers, _LEAST))
                still[columns.where(name)] = numbers == 0
        if "update_norm" in self._signals:
            logs[columns.where("update_norm")] -= log_rate
        return logs, still


def _log_rate(one: StepNumbers, *, is_known: bool) -> float:
    if is_known or one.rate is None:
        return one.log_factor
    return math.log(one.rate) if one.rate > 0 and math.isfinite(one.rate) else math.nan
