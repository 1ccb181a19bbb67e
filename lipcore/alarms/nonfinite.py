"""Non-finite values: an exact check, without a score and outside the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lipcore.alarms.budget import QUIET
from lipcore.alarms.event import AlarmEvent
from lipcore.models.names import listed

SIGNAL = "nonfinite"


class NonFinite:
    """Finder of the steps in which something becomes NaN or infinite, and of what. A place that was not finite in one
    of the 20 steps before is not told again."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}

    def step(
        self, number: int, loss: float | None, row: Mapping[str, NDArray[np.float64]], places: Sequence[str]
    ) -> AlarmEvent | None:
        """Return the alarm of a step, from its loss and from its norms by quantity, [places]."""
        found: dict[str, list[str]] = {}
        if loss is not None and not np.isfinite(loss):
            found["loss"] = ["total"]
        for quantity, what in (("grad_norm", "gradient"), ("weight_norm", "parameter")):
            bad = ~np.isfinite(row[quantity]) if quantity in row else np.zeros(0, bool)
            # A step without any gradient has NaN in every place: nothing is known of it.
            if bad.any() and not (what == "gradient" and np.isnan(row[quantity]).all()):
                found[what] = [places[i] for i in np.flatnonzero(bad).tolist()]
        fresh = {what: [p for p in where if self._is_fresh(what, p, number)] for what, where in found.items()}
        self._last |= {(what, place): number for what, where in found.items() for place in where}
        fresh = {what: where for what, where in fresh.items() if where}
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

    def _is_fresh(self, what: str, place: str, number: int) -> bool:
        return number - self._last.get((what, place), -QUIET - 1) > QUIET
