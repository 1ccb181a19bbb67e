"""Which layer's numbers changed in which step: scores against the steps before, and the order of what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_GAP = 3  # quiet steps that a fault may have in it
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
    """

    step: int
    quantity: str
    place: str
    score: float
    times: float
    peak_times: float
    peak_step: int
    parameter: str = ""

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
        usual: [places].
        limit: beyond which a score is a change.
        compared: how many steps it was compared with.
    """

    stretch: Stretch
    z: Array
    usual: Array
    limit: float
    compared: int


def scores(found: Stretch, step: int, *, upwards: bool = False) -> Scores:
    """Compare numbers with those of up to 100 steps before a step: z = (log x - median) / (1.4826 MAD + 0.01).

    The limit is 6, or more where the numbers before are as unusual as that by themselves.
    """
    row = found.row(step)
    base = slice(max(0, row - LEAD - BEFORE), max(0, row - LEAD))
    if found.there[base].sum() < _ENOUGH:
        base = slice(max(0, row - BEFORE), row)
    compared = int(found.there[base].sum())
    positive = np.where(np.isfinite(found.values), np.maximum(found.values, _LEAST), np.nan)
    logs = np.log(positive)
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
    return Scores(found, np.where(lost, np.inf, z), np.exp(medians), limit, compared)


def begin_of(every: Sequence[Scores], step: int) -> int:
    """Return the step in which what is seen at a step began: back from there, as long as anything is not as usual."""
    begin = step
    for at in range(step, step - LEAD - 1, -1):
        if begin - at > _GAP:
            break
        for one in every:
            row = one.stretch.row(at)
            if row >= 0 and (np.abs(one.z[row]) > one.limit).any():
                begin = at
    return begin


def changes(every: Mapping[str, Scores], begin: int, end: int, *, loss_at: int | None = None) -> list[Change]:
    """Return what changed between two steps, in the order in which it did: by step, in a step by what is not finite,
    then by score.

    Args:
        every: scores by quantity.
        loss_at: a step in which the loss counts as changed, since an alarm says so.
    """
    found = []
    for quantity, one in every.items():
        rows = slice(max(0, one.stretch.row(begin)), one.stretch.row(end) + 1)
        first = one.stretch.steps[rows][0] if len(one.stretch.steps[rows]) else begin
        sizes = np.nan_to_num(np.abs(one.z[rows]), nan=0.0, posinf=np.inf)
        for column, place in enumerate(one.stretch.places):
            over = sizes[:, column] > one.limit
            if quantity == "logged/loss" and loss_at is not None and first <= loss_at <= end:
                over[loss_at - int(first)] = True
            if over.any():
                found.append(_change(quantity, place, one, rows, column, int(over.argmax()), sizes[:, column]))
    return sorted(found, key=lambda one: (one.step, one.finite, -one.score, one.stage))


def _change(quantity: str, place: str, one: Scores, rows: slice, column: int, at: int, sizes: Array) -> Change:
    values, steps = one.stretch.values[rows, column], one.stretch.steps[rows]
    usual = float(one.usual[column])
    finite = np.where(np.isfinite(values), sizes, -1.0)
    peak = int(finite.argmax())
    times = [float(values[i] / usual) if np.isfinite(values[i]) and usual > 0 else float("nan") for i in (at, peak)]
    return Change(int(steps[at]), quantity, place, float(sizes[at]), times[0], times[1], int(steps[peak]))
