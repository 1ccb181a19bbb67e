"""Movement that the optimizer did not make: an exact check, outside the budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lipcore.alarms.budget import QUIET
from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.repeats import Repeats
from lipcore.models.names import listed

SIGNAL = "unexplained_movement"


class UnexplainedMovement:
    """Finder of the steps in which parameters moved by what their optimizer's step does not explain. A parameter of
    which that was so in one of the 20 steps before, or when its turn was last, is not told again.

    Args:
        limit: of the difference over what rounding may make of it.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._repeats = Repeats()

    def step(
        self, number: int, scores: NDArray[np.float64], places: Sequence[str], turns: int = 1
    ) -> AlarmEvent | None:
        """Return the alarm of a step, from the scores of its places; NaN where one is not checked. In so many `turns`,
        each of a step, all are checked once."""
        if not np.fmax.reduce(scores, initial=0.0) > self._limit:  # one look, as it is in nearly every step
            return None
        over = {places[i]: float(scores[i]) for i in np.flatnonzero(scores > self._limit).tolist()}
        fresh = sorted(
            ((over[place], place) for place in self._repeats.fresh(number, over, max(QUIET, turns))), reverse=True
        )
        if not fresh:
            return None
        score, place = fresh[0]
        others = f"; so did {listed([name for _, name in fresh[1:]])}" if fresh[1:] else ""
        seldom = "" if turns == 1 else f"; it is checked in one step of {turns}, and may have done so before"
        words = (
            f"alarm in step {number} at {place}: since the step before, {place} moved by what its optimizer's step "
            f"does not explain, {score:.3g} times what rounding may make of it{others}{seldom}"
        )
        return AlarmEvent(number, SIGNAL, place, score, words)
