"""The budget: one multiplier of all limits, calibrated on the run itself."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

#: Steps in which an alarm is the only one, and over which a peak is taken.
QUIET = 20
_MEMORY = 4000  # steps that are calibrated on
_FEWEST = 5  # stretches of a phase before which the multiplier does not fall
_TAIL = 10  # peaks at least, beside those that the budget allows, by which the greatest are judged; a third where fewer
_USUAL = 0.1  # mean of the logarithms of such peaks over the next one, before anything is known of a run
_WEIGHT = 5  # peaks that this counts as
_LEAST, _MOST = 1e-300, 700.0  # a chance, and a logarithm, that floating-point numbers can be made of


@dataclass(frozen=True)
class _Stretch:
    peak: float
    steps: int
    direction: int  # of the learning rate


class Budget:
    """Keeper of the multiplier, from the peaks of the score in stretches of 20 steps.

    The score of a step is the greatest of all columns, as a share of its limit. Let there be K = budget n / 1000 alarms
    in n steps, the last 4000 at most. The multiplier is

    * at least the ceil(K)-th greatest peak: so many alarms are the budget's;
    * below 1, at least what a new peak is over with the chance of the budget, K / N of N peaks, by
      :func:`predicted`: the greatest of a few peaks is over by the next one too often;
    * at least `least`, and at least 1 before 5 stretches are known.

    A peak counts at most twice the multiplier, lest one great fault hide those after it.

    Peaks count in phases of their own kind: where the learning rate rises, where it is constant, where it falls. A
    phase of a kind of which less than 5 stretches are known begins with the multiplier as it was, or 1 if that was
    less.

    Args:
        per_1000: alarms per 1000 steps.
        least: what the multiplier falls to at the lowest, at most 1.
    """

    def __init__(self, per_1000: float, least: float = 1.0) -> None:
        self.per_1000, self._least = per_1000, least
        self.multiplier = 1.0
        self.steps = self.alarms = 0  #: that were scored, and alarms in them
        self._stretches: deque[_Stretch] = deque()
        self._peak, self._length, self._known = 0.0, 0, 0
        self._rate = self._begin_rate = math.nan  # logarithms: now, and at the end of the stretch before
        self._direction = 0  # of the phase

    @property
    def met(self) -> float:
        """Alarms per 1000 steps that there really were; NaN before the first."""
        return 1000 * self.alarms / self.steps if self.steps else math.nan

    def observe(self, score: float, *, alarmed: bool, log_rate: float = 0.0) -> None:
        """Take a step's score in, in which there was an alarm or not, and the logarithm of its learning rate."""
        self.steps += 1
        if alarmed:  # its stretch begins with it, so that it is one peak
            self.alarms += 1
            self._end()
        if math.isfinite(log_rate):
            self._rate = log_rate
            self._begin_rate = log_rate if math.isnan(self._begin_rate) else self._begin_rate
        self._peak = max(self._peak, min(score, 2 * self.multiplier))
        self._length += 1
        if self._length >= QUIET:
            self._end()
            self._calibrate()

    def _end(self) -> None:
        if self._length:
            direction = _sign(self._rate - self._begin_rate)
            self._begin_rate = self._rate
            if direction != self._direction:
                self._direction, self.multiplier = direction, max(1.0, self.multiplier)
            self._stretches.append(_Stretch(self._peak, self._length, direction))
            self._known += self._length
        while self._known > _MEMORY:
            self._known -= self._stretches.popleft().steps
        self._peak, self._length = 0.0, 0

    def _calibrate(self) -> None:
        own = [stretch for stretch in self._stretches if stretch.direction == self._direction]
        steps = sum(stretch.steps for stretch in own)
        allowed = min(self.per_1000 * steps / 1000, steps)
        peaks = sorted((stretch.peak for stretch in own), reverse=True)
        count = max(1, math.ceil(allowed))
        seen = peaks[count - 1] if count <= len(peaks) else 0.0
        if len(peaks) < _FEWEST:
            self.multiplier = max(1.0, seen, self.multiplier)
        else:
            self.multiplier = max(self._least, seen, min(1.0, predicted(peaks, allowed)))


def predicted(peaks: Sequence[float], allowed: float) -> float:
    """Return what a new peak is over with the chance allowed / N, given N peaks, the greatest first.

    The logarithms of the greatest k peaks over the next one, with the sum S, are taken to be exponential, of a mean
    that is not known but for those of 5 more, as they usually are: a + S = S + 0.5, n = k + 5. The next one is then
    over t with the chance (1 + t / (S + 0.5))^-(k + 5), of those that are over the (k + 1)-th peak at all.
    """
    count = max(1, math.ceil(allowed))
    k = max(count, min(math.ceil(len(peaks) / 3), count + _TAIL - 1))
    if k >= len(peaks):
        return 0.0
    logs = [math.log(max(peak, 1e-3)) for peak in peaks[: k + 1]]
    total = sum(log - logs[k] for log in logs[:k]) + _USUAL * _WEIGHT
    chance = max(allowed / k, _LEAST)
    return math.exp(min(logs[k] + total * (chance ** (-1 / (k + _WEIGHT)) - 1), _MOST))


def _sign(change: float) -> int:
    return 0 if math.isnan(change) or abs(change) < 1e-12 else 1 if change > 0 else -1
