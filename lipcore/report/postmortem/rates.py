"""Learning rates of a recorded run: those of a step, and what they have in common, which updates are judged without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipcore.alarms.rates import RateFactor
from lipcore.report.source import Source
from lipcore.report.stretch import stretch

Array = np.ndarray[Any, Any]

RATES, LOGGED = "optimizer/group_lr", "logged/lr"
_JUMP = 1.5  # of a learning rate from one step to the next


@dataclass(frozen=True)
class Rate:
    """Learning rate of a group of the optimizer, or as it was logged: in the step, in the step before, and the
    greatest of the steps before that are compared with."""

    group: str
    here: float
    before: float
    greatest: float

    @property
    def jumped(self) -> bool:
        """True where it is another one than in the step before, by half or more."""
        times = self.here / self.before if self.before > 0 else np.nan
        return bool(times > _JUMP or times < 1 / _JUMP)


def rates_of(run: Source, names: Sequence[str], first: int, step: int) -> list[Rate]:
    """Return the learning rates of a step."""
    found = []
    logged = [name for name in names if name.startswith("logged/") and _is_rate(name)]
    for quantity in [RATES] if RATES in names else logged:
        one = stretch(run, quantity, first, step)
        for column, group in enumerate(one.places):
            values = one.values[:, column]
            if np.isfinite(values[-1]):
                earlier = values[:-1][np.isfinite(values[:-1])]
                before = float(earlier[-1]) if len(earlier) else float("nan")
                own = quantity.partition("/")[2] if quantity != RATES else group
                found.append(Rate(own, float(values[-1]), before, float(earlier.max()) if len(earlier) else before))
    return found


def log_rates(run: Source, names: Sequence[str], first: int, last: int, jumps_from: int) -> Array:
    """Return the logarithm of the rate that updates are divided by, [steps]: that which all groups have in common, as
    for the alarms; NaN where it is 0.

    A jump upwards from a step on is left in the updates, until the rate is back: it is a finding.
    """
    quantity = RATES if RATES in names else LOGGED
    if quantity not in names:
        return np.zeros(last - first + 1)
    found = stretch(run, quantity, first, last)
    known = np.isfinite(found.values)
    rates = np.where(known, found.values, 0.0)
    rates[:, ~known.any(0)] = 1.0  # on a device: taken to be constant, as by the alarms
    follower = RateFactor()
    logs, log, before, jumped = np.zeros(len(rates)), 0.0, 0.0, 0.0
    for row, there in enumerate(found.there):
        log = follower.log_factor(rates[row].tolist()) if there else log
        if math.isfinite(log):
            change, before = log - before, log
            if found.steps[row] >= jumps_from and change > math.log(_JUMP):
                jumped += change
            elif change < 0:
                jumped = max(0.0, jumped + change)
        logs[row] = log - jumped
    return logs


def _is_rate(name: str) -> bool:
    own = name.partition("/")[2].lower()
    return own == "lr" or own.endswith("_lr") or own.startswith("lr") or "learning_rate" in own
