"""The warning light: larger steps than usual for their gradients, which go before some spikes. No alarm."""

from __future__ import annotations

import math

import numpy as np

from lipcore.alarms.baseline import Baseline

QUANTITY = "normalized_update_rms"
#: Score over which it goes on.
LIMIT = 3.0
_STAYS = 10  # steps that it stays on for after the last one over the limit


class WarningLight:
    """Light that is on while the root mean square of AdamW's normalised update, of all parameters together, is larger
    than usual: z > 3 of its logarithm against the 100 steps before, or so in one of the last 10 steps.

    It is no alarm and outside the budget: docs/alarms.md says how often it was on before spikes, and otherwise.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []  # first and last step in which it was on
        self.is_known = False  #: the number has been seen
        self._last_over: int | None = None
        self._now = 0
        self._baseline = Baseline(1)

    @property
    def steps(self) -> int:
        """Number of steps in which it was on."""
        return sum(last - first + 1 for first, last in self._spans)

    @property
    def since(self) -> int | None:
        """Step in which it last went on; None before."""
        return self._spans[-1][0] if self._spans else None

    @property
    def is_on(self) -> bool:
        """True while it is on, as of the last step that was looked at."""
        return self._last_over is not None and self._now <= self._last_over + _STAYS

    def step(self, number: int, rms: float) -> str:
        """Take a step's root mean square in; return, where the light goes on in it, a sentence, else ""."""
        was, self._now = self.is_on, number
        log = np.array([math.log(rms) if math.isfinite(rms) and rms > 0 else math.nan])
        self.is_known |= not math.isnan(log[0])
        score = float(self._baseline.scores(log)[0])
        self._baseline.take(log, np.ones(1, bool))
        if score > LIMIT:
            self._last_over = number
        if self.is_on:
            begun = self._spans.pop()[0] if was else number
            self._spans.append((begun, number))
        if not self.is_on or was:
            return ""
        times = math.exp(log[0] - self._baseline.medians[0])
        return (
            f"warning light on in step {number}: the normalized update's RMS is {times:.3g} times its usual value "
            f"(score {score:.3g}, limit {LIMIT:g})"
        )

    def forget(self, step: int) -> None:
        """Go off, and go on behind a step: those after it are made again."""
        self._last_over, self._baseline = None, Baseline(1)
        self._spans = [(first, min(last, step)) for first, last in self._spans if first <= step]
