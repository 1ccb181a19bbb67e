"""Non-finite values: an exact check, without a score and outside the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.repeats import Repeats
from lipcore.models.names import listed

SIGNAL = "nonfinite"
#: Quantities that are looked at, and what each is of.
OF = {"grad_norm": "gradient", "weight_norm": "parameter"}


class NonFinite:
    """Finder of the steps in which something becomes NaN or infinite, and of what. A place that was not finite in one
    of the 20 steps before is not told again."""

    def __init__(self) -> None:
        self._repeats = Repeats()

    def step(
        self, number: int, loss: float | None, row: Mapping[str, NDArray[np.float64]], places: Sequence[str]
    ) -> AlarmEvent | None:
        """Return the alarm of a step, from its loss and from its norms by quantity, [places]."""
        found: dict[str, list[str]] = {}
        if loss is not None and not math.isfinite(loss):
            found["loss"] = ["total"]
        for quantity, what in OF.items():
            if quantity not in row or math.isfinite(np.add.reduce(row[quantity])):  # a finite sum has finite terms
                continue
            bad = ~np.isfinite(row[quantity])
            # A step without any gradient has NaN in every place: nothing is known of it.
            if bad.any() and not (what == "gradient" and np.isnan(row[quantity]).all()):
                found[what] = [places[i] for i in np.flatnonzero(bad).tolist()]
        if not found:
            return None
        fresh: dict[str, list[str]] = {}
        for what, place in self._repeats.fresh(number, [(what, p) for what, where in found.items() for p in where]):
            fresh.setdefault(what, []).append(place)
        if not fresh:
            return None
        # A loss that is not finite spoils every gradient, and a gradient its parameter: the first of them is the cause.
        first = next(iter(fresh))
        where = next((fresh[what][0] for what in ("gradient", "parameter") if what in fresh), "total")
        said = "; ".join(
            "the loss" if what == "loss" else f"{what} of {listed(where)}" for what, where in fresh.items()
        )
        place = "total" if first == "loss" else where
        return AlarmEvent(number, SIGNAL, place, float("inf"), f"alarm in step {number}: not finite: {said}")
