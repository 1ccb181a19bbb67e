"""Trainings that fail by themselves: a learning rate that rises until the loss explodes, and one that is too high from
the first step on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikes.detectors import USUAL
from spikes.evaluate import Limits, Look
from spikes.run import Series, clean

# The published scenario of a tool that claims a lead for activation kurtosis: a constant rate for 120 steps, then 1.2
# times as much in every step; the baseline is that of the last 40 steps before it, and the loss has exploded where it
# is 10 times its mean there.
RAMP_AT, FACTOR, STEPS, BASELINE, EXPLODED = 120, 1.2, 260, 40, 10.0
RATES = {"transformer": 1e-3, "mlp": 1e-3, "cnn": 0.01}
TOO_HIGH = {"transformer": 0.06, "mlp": 0.1, "cnn": 0.15}  # from the first step on, without warm-up
HOT_STEPS = 500
_BEFORE = 10  # steps before a spike


def ramped(task: str, seed: int) -> Series:
    """Record a training whose learning rate rises until the loss explodes."""
    return clean(task, seed, STEPS, lambda step: RATES[task] * FACTOR ** max(0, step - RAMP_AT))


def flat(task: str, seed: int) -> Series:
    """Record the same training with a constant rate: the control."""
    return clean(task, seed, STEPS, lambda step: RATES[task])


def hot(task: str, seed: int) -> Series:
    """Record a training with too high a rate from the first step on."""
    return clean(task, seed, HOT_STEPS, lambda step: TOO_HIGH[task])


def explosion(loss: NDArray[Any]) -> int | None:
    """Return the first step, from 0, whose loss is 10 times the mean before the ramp, or not finite; None: there is
    none."""
    usual = loss[RAMP_AT - BASELINE : RAMP_AT].mean()
    over = np.flatnonzero(~np.isfinite(loss) | (loss > EXPLODED * usual))
    return int(over[0]) if len(over) else None


def _columns(series: Series) -> dict[str, NDArray[Any]]:
    """Return the numbers that the published rule is applied to, [steps, columns]."""
    total = series["grad_norm"][:, series["levels"] == "total"]
    found = {"activation kurtosis": series["kurtosis"], "loss": series["loss"][:, None], "global gradient norm": total}
    if "normalized_update_rms" in series:
        found["normalized_update_rms"] = series["normalized_update_rms"][:, None]
    return found


def crossing(numbers: NDArray[Any], sigmas: float = 3.0) -> int | None:
    """Return the first step from the ramp on in which a column is 3 x 1.4826 MAD over its median before, as the
    published rule has it; None: there is none."""
    before = numbers[RAMP_AT - BASELINE : RAMP_AT]
    middle = np.median(before, axis=0)
    spread = 1.4826 * np.median(np.abs(before - middle), axis=0)
    with np.errstate(invalid="ignore"):
        over = np.flatnonzero((numbers[RAMP_AT:] > middle + sigmas * spread).any(1))
    return RAMP_AT + int(over[0]) if len(over) else None


def explosions(runs: Sequence[Series], controls: Sequence[Series], limits: Limits) -> dict[str, Any]:
    """Return the steps of lead before the explosion: by the published rule, beside how soon the same rule fires in
    trainings without a ramp; and of every detector at its frozen threshold."""
    ends = [explosion(series["loss"]) for series in runs]
    exploded = [(series, end) for series, end in zip(runs, ends, strict=True) if end is not None]
    found: dict[str, Any] = {"runs": len(runs), "explosions": [end for _, end in exploded], "ramp_at": RAMP_AT}
    if not exploded:
        return found
    within = int(np.median([end for _, end in exploded])) - RAMP_AT
    rule = {}
    for name in _columns(exploded[0][0]):
        first = [(crossing(_columns(series)[name]), end) for series, end in exploded]
        leads = [end - step for step, end in first if step is not None and step < end]
        quiet = [crossing(_columns(series)[name]) for series in controls]
        soon = [step for step in quiet if step is not None and step < RAMP_AT + within]
        # What the rule would be said to have led by, had a training without a ramp exploded at the same time.
        chance = [RAMP_AT + within - step for step in soon]
        rule[name] = {"leads": leads, "controls": len(controls), "controls_fired": len(soon), "control_leads": chance}
    found["published_rule"] = rule
    looks = [(Look(series, limits), end) for series, end in exploded]
    quiet_looks = [Look(series, limits) for series in controls]
    detectors = {}
    for name in looks[0][0].names():
        firsts = [(look.first(name, RAMP_AT, end), end) for look, end in looks]
        leads = [end - first[0] for first, end in firsts if first is not None]
        fired = sum(look.first(name, RAMP_AT, RAMP_AT + within) is not None for look in quiet_looks)
        detectors[name] = {"leads": leads, "controls": len(controls), "controls_fired": fired}
    found["detectors"] = detectors
    return found


def spikes(runs: Sequence[Series], limits: Limits) -> dict[str, Any]:
    """Return how often each detector was over its limit in the 10 steps before a spike of the loss, and in stretches of
    10 steps that are far from one."""
    looks = [Look(series, limits) for series in runs]
    of_loss = [look.steps("loss") for look in looks]
    found: dict[str, Any] = {"runs": len(runs), "spikes": sum(map(len, of_loss)), "detectors": {}}
    for name in looks[0].names():
        row: Mapping[str, int] = _before(looks, of_loss, name)
        found["detectors"][name] = row
    return found


def _before(looks: Sequence[Look], of_loss: Sequence[Sequence[int]], name: str) -> dict[str, int]:
    row = {"before": 0, "spikes": 0, "quiet": 0, "quiet_stretches": 0}
    for look, spiked in zip(looks, of_loss, strict=True):
        for step in spiked:
            if step >= USUAL + _BEFORE:
                row["spikes"] += 1
                row["before"] += look.first(name, step - _BEFORE, step) is not None
        for step in range(USUAL, len(look.scores["loss"].most) - _BEFORE, _BEFORE):
            if all(abs(step - other) > 2 * _BEFORE for other in spiked):
                row["quiet_stretches"] += 1
                row["quiet"] += look.first(name, step, step + _BEFORE) is not None
    return row
