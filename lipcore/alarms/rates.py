"""The learning rate that all groups of the optimizers have in common, by its changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class RateFactor:
    """Follower of several learning rates as one factor.

    A schedule changes all of them alike. A change of one group alone is no schedule, and is to be seen in the updates:
    so a step's change is the smallest of all groups'.
    """

    def __init__(self) -> None:
        self._seen: list[float] = []
        self._last: list[float] = []  # of each group, the last that was not 0
        self._log = 0.0

    def log_factor(self, rates: list[float]) -> float:
        """Return the logarithm of the rates of a step over those at first; NaN where all are 0."""
        if rates != self._seen:
            self._seen = rates
            if len(rates) != len(self._last):  # a group came or went: what was is of other groups
                self._last = [0.0] * len(rates)
            changes = [math.log(new / old) for new, old in zip(rates, self._last, strict=True) if new > 0 and old > 0]
            self._log += min(changes, key=abs, default=0.0)
            self._last = [new if new > 0 else old for new, old in zip(rates, self._last, strict=True)]
        return self._log if not rates or any(rate > 0 for rate in rates) else math.nan


class CommonRate:
    """Follower of the learning rates of optimizers' groups, as one factor."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self._optimizers, self._factor = optimizers, RateFactor()

    @property
    def known(self) -> bool:
        """True where there is an optimizer whose rates these are."""
        return bool(self._optimizers)

    def log_factor(self) -> float:
        """Return the logarithm of the rate now over that at first; NaN where all rates are 0. A rate that lies on a
        device, which would have to be waited for, is taken to be constant."""
        groups = [group for optimizer in self._optimizers for group in getattr(optimizer, "param_groups", ())]
        return self._factor.log_factor([_host_number(group.get("lr", 1.0)) for group in groups])


def _host_number(rate: Any) -> float:
    on_device = isinstance(rate, Tensor) and not rate.is_cpu
    return 1.0 if on_device else float(rate)
