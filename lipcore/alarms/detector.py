"""From the numbers of a step to an alarm, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lipcore.alarms.baseline import Baseline
from lipcore.alarms.budget import QUIET, Budget
from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.lasting import Lasting
from lipcore.alarms.signals import Signal

_NOTHING = 1e-18  # times the usual value: a norm of 0, which has a logarithm in name only


@dataclass(frozen=True)
class Columns:
    """Signal and place of each number of a step."""

    signals: tuple[Signal, ...]
    places: tuple[str, ...]

    @classmethod
    def of(cls, signals: Mapping[str, Signal], groups: Sequence[str]) -> Columns:
        """Make those of some signals, with a column per group for those that have one."""
        pairs = [(s, place) for s in signals.values() for place in (groups if s.of_groups else ["total"])]
        return cls(tuple(s for s, _ in pairs), tuple(place for _, place in pairs))

    @cached_property
    def _where(self) -> dict[str, NDArray[np.bool_]]:
        names = [signal.name for signal in self.signals]
        return {name: np.array([other == name for other in names]) for name in dict.fromkeys(names)}

    def where(self, name: str) -> NDArray[np.bool_]:
        """Return which columns are a signal's."""
        found = self._where.get(name)
        return np.zeros(len(self.signals), bool) if found is None else found


class Detector:
    """Detector of steps that are not as usual.

    A column is over the limit in a step where its score, or its cumulative sum, is more than the multiplier times its
    limit. That is an alarm, unless there was one in the 20 steps before. Values over the limit stay out of the baseline
    for 20 steps; what lasts longer is the new level, which enters it and alarms no more.
    """

    def __init__(self, columns: Columns, budget: Budget) -> None:
        self._columns, self._budget = columns, budget
        self._limits = np.array([signal.limit for signal in columns.signals])
        self._two_sided = np.array([signal.two_sided for signal in columns.signals], dtype=bool)
        self._mirrored = np.where(self._two_sided, -1.0, 0.0)
        self._of = {signal.name: columns.where(signal.name) for signal in columns.signals}
        self._baseline = Baseline(len(self._limits))
        self._lasting = Lasting(self._two_sided)
        self._over = np.zeros(len(self._limits), np.int64)  # steps over the limit, less those that were not, since
        self._silent_to = 0  # the last step of an alarm's 20

    def step(self, number: int, logs: NDArray[np.float64], log_rate: float = 0.0) -> AlarmEvent | None:
        """Take the logarithms of a step's numbers in, NaN where there is none, and of its learning rate; return its
        alarm."""
        z = self._baseline.scores(logs)
        unknown = np.isnan(z)
        if unknown.all():
            self._baseline.take(logs)
            return None
        signed = z / self._limits
        signed[unknown] = 0.0
        shares = np.maximum(signed, signed * self._mirrored)
        multiplier = self._budget.multiplier
        sums = self._lasting.observe(signed, shares <= multiplier)
        shares = np.maximum(shares, np.abs(sums))
        over = shares > multiplier
        if not (over.any() or self._over.any()):  # as nearly every step is
            self._baseline.take(logs)
            self._budget.observe(float(shares.max()), alarmed=False, log_rate=log_rate)
            return None
        self._over = np.where(over, self._over + 1, np.maximum(0, self._over - 1))
        lasting = self._over > QUIET
        shares = np.where(lasting, 0, shares)
        alarmed = bool((shares > multiplier).any()) and number > self._silent_to
        event = self._event(number, logs, z, sums, shares) if alarmed else None
        if alarmed:
            self._silent_to = number + QUIET
        self._lasting.clear(np.abs(sums) > multiplier)
        self._baseline.take(logs, ~over | lasting)
        self._budget.observe(float(shares.max()), alarmed=alarmed, log_rate=log_rate)
        return event

    def _event(
        self,
        number: int,
        logs: NDArray[np.float64],
        z: NDArray[np.float64],
        sums: NDArray[np.float64],
        shares: NDArray[np.float64],
    ) -> AlarmEvent:
        top = int(np.argmax(shares))
        signal = self._columns.signals[top]
        place = self._place(signal.name, top, shares)
        limit = f"limit {signal.limit:g} x {self._budget.multiplier:.3g}"
        at = "" if place == "total" else f" at {place}"
        gathered = abs(sums[top]) == shares[top]
        score = float(sums[top] * signal.limit if gathered else z[top])
        if gathered:
            what = f"has been {'higher' if sums[top] > 0 else 'lower'} than usual for a while"
        else:
            times = np.exp(np.clip(logs[top] - self._baseline.medians[top], -700, 700))
            what = "is 0" if times < _NOTHING else f"is {times:.3g} times its usual value"
        words = f"{signal.words} {what} (score {score:.3g}, {limit})"
        return AlarmEvent(number, signal.name, place, score, f"alarm in step {number}{at}: {words}")

    def _place(self, signal: str, top: int, shares: NDArray[np.float64]) -> str:
        """Return where: of a gradient's fault where its norm stands out most, of others where an update's does, which
        is the layer that was moved."""
        if signal in ("grad_norm", "rms_t"):
            return self._columns.places[top]
        for name in ("update_norm", "grad_norm"):
            own = np.where(self._of.get(name, False), shares, 0)
            if own.max() > self._budget.multiplier:
                return self._columns.places[int(np.argmax(own))]
        return "total"
