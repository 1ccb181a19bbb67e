"""Which layer's numbers changed in which step: scores against the steps before, and the order of what changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lipcore.report.stretch import Stretch

Array = np.ndarray[Any, Any]

#: Steps before that a step is compared with, and those right before it that are not among them, since a fault may have
#: begun there; steps after it in which it is followed.
BEFORE, LEAD, AFTER = 100, 16, 32
_ENOUGH, _FEW = 20, 5  # steps to compare with; where there are fewer, those right before it are taken too
LIMIT = 6.0  #: a score beyond is a change: that of the alarms on norms
_NOISE = 0.01  # added to the spread, as for the alarms
_LEAST = 1e-30
_ROUNDING = 1e-4  # of a recorded norm
GAP = 3  # quiet steps that a fault may have in it
#: In the order in which a step makes them.
STAGES = {
    "logged/loss": "loss",
    "trajectory/grad_norm": "gradient norm",
    "trajectory/update_norm": "update norm",
    "trajectory/weight_norm": "weight norm",
}


@dataclass(frozen=True)
class Change:
    """One quantity of one place that is not as usual from a step on.

    Attributes:
        step: in which it is seen first.
        quantity: full name: "trajectory/update_norm".
        place: of a group of parameters, where there are groups.
        score: there; infinite where the value is not finite.
        times: the value there over the usual one; NaN where it is not finite.
        peak_times, peak_step: the same, where it is furthest away.
        parameter: whose own number changed most in that step; "" where single parameters were not recorded.
        over_rate: it was judged without the changes of the learning rate, of which there were some.
    """

    step: int
    quantity: str
    place: str
    score: float
    times: float
    peak_times: float
    peak_step: int
    parameter: str = ""
    over_rate: bool = False

    @property
    def what(self) -> str:
        """The quantity in words."""
        return STAGES[self.quantity]

    @property
    def stage(self) -> int:
        """Number of the quantity in the order in which a step makes them."""
        return list(STAGES).index(self.quantity)

    @property
    def finite(self) -> bool:
        """False where the value is NaN or infinite."""
        return bool(np.isfinite(self.score))


@dataclass(frozen=True)
class Scores:
    """Scores of one quantity, [steps, places], against the steps before.

    Attributes:
        z: NaN where there is no number to compare; infinite where the value is not finite, and was before.
        times: the values over the usual ones; NaN where there is none, or it is not finite.
        over: which are changes.
        limit: beyond which a score is a change.
        compared: how many steps it was compared with.
        over_rate: they were judged without the changes of the learning rate, of which there were some.
    """

    stretch: Stretch
    z: Array
    times: Array
    over: Array
    limit: float
    compared: int
    over_rate: bool


def scores(
    found: Stretch,
    step: int,
    *,
    upwards: bool = False,
    log_rates: Array | None = None,
    alarmed: Collection[tuple[int, str]] = (),
) -> Scores:
    """Compare numbers with those of up to 100 steps before a step: z = (log x - median) / (1.4826 MAD + 0.01).

    The limit is 6, or more where the numbers before are as unusual as that by themselves.

    Args:
        upwards: a fall is no change.
        log_rates: logarithms of the learning rate, [steps], which the numbers are divided by.
        alarmed: steps and places of alarms on these numbers, which count as changes.
    """
    row = found.row(step)
    base = slice(max(0, row - LEAD - BEFORE), max(0, row - LEAD))
    if found.there[base].sum() < _ENOUGH:
        base = slice(max(0, row - BEFORE), row)
    compared = int(found.there[base].sum())
    compared = compared if compared >= _FEW else 0
    positive = np.where(np.isfinite(found.values), np.maximum(found.values, _LEAST), np.nan)
    by = np.zeros(len(found.steps)) if log_rates is None else log_rates
    divided = len(np.unique(by[np.isfinite(by)])) > 1
    logs = np.log(positive) - by[:, None]
    medians, spreads = (np.full(logs.shape[1], np.nan) for _ in range(2))
    known = np.isfinite(logs[base]).sum(0) >= _FEW
    if known.any():
        medians[known] = np.nanmedian(logs[base][:, known], axis=0)
        away = np.abs(logs[base][:, known] - medians[known])
        spreads[known] = 1.4826 * np.nanmedian(away, axis=0) + _NOISE
    z = (logs - medians) / spreads
    if upwards:
        z = np.where(z < 0, 0.0, z)
    before = np.abs(z[base])
    before = before[np.isfinite(before)]
    limit = max(LIMIT, 1.5 * float(np.quantile(before, 0.99))) if len(before) else LIMIT
    lost = found.there[:, None] & ~np.isfinite(found.values) & known
    z = np.where(lost, np.inf, z)
    with np.errstate(all="ignore"):
        usual = np.exp(medians + by[:, None])
        times = np.where((usual > 0) & np.isfinite(found.values), found.values / usual, np.nan)
    over = np.abs(z) > limit
    for at, place in alarmed:
        if place in found.places and 0 <= found.row(at) < len(over):
            cell = found.row(at), found.places.index(place)
            over[cell] |= np.isfinite(found.values[cell])
    return Scores(found, z, times, over, limit, compared, divided)


def begin_of(every: Sequence[Scores], step: int) -> int:
    """Return the step in which what is seen at a step began: back from there, as long as anything is not as usual."""
    begin = step
    for at in range(step, step - LEAD - 1, -1):
        if begin - at > GAP:
            break
        for one in every:
            row = one.stretch.row(at)
            if row >= 0 and one.over[row].any():
                begin = at
    return begin


def without_drift(every: Mapping[str, Scores]) -> dict[str, Scores]:
    """Return scores in which a norm of weights is a change only where it moved by more than the updates: weights that
    grow by usual updates are what training is."""
    weights, updates = (every.get(f"trajectory/{name}_norm") for name in ("weight", "update"))
    if weights is None or updates is None or weights.stretch.places != updates.stretch.places:
        return dict(every)
    norms, moved = weights.stretch.values, updates.stretch.values
    with np.errstate(invalid="ignore"):
        steps = np.abs(np.diff(norms, axis=0, prepend=np.nan))
        near = np.fmax(moved, np.fmax(np.roll(moved, 1, axis=0), np.roll(moved, -1, axis=0)))
        beyond = ~(steps <= near + _ROUNDING * norms) & ~(np.isfinite(norms) & ~np.isfinite(steps))
    kept = replace(weights, z=np.where(weights.over & ~beyond, np.nan, weights.z), over=weights.over & beyond)
    return {**every, "trajectory/weight_norm": kept}


def changes(every: Mapping[str, Scores], begin: int, end: int) -> list[Change]:
    """Return what changed between two steps, in the order in which it did: by step, in a step by what is not finite,
    then by score.

    Args:
        every: scores by quantity.
    """
    found = []
    for quantity, one in every.items():
        rows = slice(max(0, one.stretch.row(begin)), one.stretch.row(end) + 1)
        sizes = np.nan_to_num(np.abs(one.z[rows]), nan=0.0, posinf=np.inf)
        for column, place in enumerate(one.stretch.places):
            over = one.over[rows, column]
            if over.any():
                found.append(_change(quantity, place, one, rows, column, int(over.argmax()), sizes[:, column]))
    return sorted(found, key=lambda one: (one.step, one.finite, -one.score, one.stage))


def _change(quantity: str, place: str, one: Scores, rows: slice, column: int, at: int, sizes: Array) -> Change:
    times, steps = one.times[rows, column], one.stretch.steps[rows]
    peak = int(np.where(np.isfinite(one.stretch.values[rows, column]), sizes, -1.0).argmax())
    ends = float(times[at]), float(times[peak]), int(steps[peak])
    return Change(int(steps[at]), quantity, place, float(sizes[at]), *ends, over_rate=one.over_rate)
