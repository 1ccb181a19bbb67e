"""The budget: one multiplier of all limits, calibrated on the run itself."""

from __future__ import annotations

import math
from collections import deque

#: Steps in which an alarm is the only one, and over which a peak is taken.
QUIET = 20
_MEMORY = 4000  # steps that are calibrated on


class Budget:
    """Keeper of the multiplier, from the peaks of the score in stretches of 20 steps.

    The score of a step is the greatest of all columns, as a share of its limit. Of the last n <= 4000 steps the
    multiplier is the K-th greatest peak, K = ceil(budget n / 1000), and at least 1: so many alarms are the budget's.
    A peak counts at most twice the multiplier, lest one great fault hide those after it.

    Args:
        per_1000: alarms per 1000 steps.
    """

    def __init__(self, per_1000: float) -> None:
        self.per_1000 = per_1000
        self.multiplier = 1.0
        self.steps = self.alarms = 0  #: that were scored, and alarms in them
        self._peaks: deque[tuple[float, int]] = deque()  # with the steps of each stretch
        self._peak, self._length, self._known = 0.0, 0, 0

    @property
    def met(self) -> float:
        """Alarms per 1000 steps that there really were; NaN before the first."""
        return 1000 * self.alarms / self.steps if self.steps else math.nan

    def observe(self, score: float, *, alarmed: bool) -> None:
        """Take a step's score in, in which there was an alarm or not."""
        self.steps += 1
        if alarmed:  # its stretch begins with it, so that it is one peak
            self.alarms += 1
            self._end()
        self._peak = max(self._peak, min(score, 2 * self.multiplier))
        self._length += 1
        if self._length >= QUIET:
            self._end()
            self._calibrate()

    def _end(self) -> None:
        if self._length:
            self._peaks.append((self._peak, self._length))
            self._known += self._length
        while self._known > _MEMORY:
            self._known -= self._peaks.popleft()[1]
        self._peak, self._length = 0.0, 0

    def _calibrate(self) -> None:
        allowed = math.ceil(self.per_1000 * self._known / 1000)
        peaks = sorted((peak for peak, _ in self._peaks), reverse=True)
        self.multiplier = max(1.0, peaks[allowed - 1]) if allowed <= len(peaks) else 1.0
