"""How long a step takes, and what of it is spent inside lipcore's call at its end: two looks at the clock a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from lipcore.metric.listener import Listener
from lipcore.report.source import StepTime

_BLOCK = 64  # steps that are handed on together
_BEGIN = 10  # steps after each start that are left out: they build plans and allocate


class Stopwatch(Listener):
    """Stopwatch of a training: measures the time from step to step, and that of the Monitor's call at a step's end.

    Hooks in the forward and backward pass, log() and threads of lipcore's are not in it.

    Args:
        hand_on: takes what was measured in up to 64 steps.
        clock: returns seconds.
    """

    def __init__(self, hand_on: Callable[[StepTime], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._hand_on, self._clock = hand_on, clock
        self._skip = _BEGIN
        self._begun: float | None = None
        self._own = 0.0  # of the call that was last
        self._steps: list[float] = []  # from step to step
        self._inside: list[float] = []  # the calls of these steps

    def begin(self) -> None:
        """Note that the call at the end of a step begins."""
        now = self._clock()
        if self._begun is not None and self._own:
            self._steps.append(now - self._begun)
            self._inside.append(self._own)
            if len(self._steps) == _BLOCK:
                self._pass_on()
        self._begun, self._own = now, 0.0

    def end(self) -> None:
        """Note that it ends."""
        if self._skip:
            self._skip -= 1
        elif self._begun is not None:
            self._own = self._clock() - self._begun

    def state_taken(self) -> None:
        self._pass_on()
        self._begun = None  # who writes a checkpoint makes no step meanwhile

    def state_loaded(self, step: int) -> None:
        self._skip, self._begun, self._steps, self._inside = _BEGIN, None, [], []

    def closed(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        if self._steps:
            # Medians: validation and checkpoints between two steps are no step, and what closes a window or proves
            # something is in one step of many, so that a mean of the calls would be of other steps than these.
            count = len(self._steps)
            inside, usual = (statistics.median(each) * count for each in (self._inside, self._steps))
            self._hand_on(StepTime(count, inside, usual))
        self._steps, self._inside = [], []
