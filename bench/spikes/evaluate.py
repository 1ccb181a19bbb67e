"""Counts what the detectors found in recorded series: faults, false alarms, layers, samples, and steps of lead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import lipcore
from lipcore.alarms.light import QUANTITY
from spikes.detectors import (
    JOINT,
    LIGHT,
    OTHERS,
    PRACTICE,
    QUIET,
    SHIPPED,
    USUAL,
    Scores,
    alarms,
    available,
    joint,
    light,
    shipped,
    threshold,
)
from spikes.faults import FAULTS, SAMPLE
from spikes.run import Series, joined

Limits = Mapping[str, float]
Row = dict[str, Any]
BUDGET = 1.0  # alarms per 1000 steps, of every detector
_Z = 1.959964
_COUNTS = ("runs", "found", "named", "right", "control", "controls")


def interval(found: int, of: int) -> tuple[float, float]:
    """Return Wilson's interval of a share, at 95 %."""
    if not of:
        return 0.0, 1.0
    share, n = found / of, float(of)
    middle, half = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + _Z**2 / n)), min(1.0, (middle + half) / (1 + _Z**2 / n))


def rate(alarms_: int, steps: int) -> Row:
    """Return alarms per 1000 steps with the interval of the share of stretches of 20 steps that have one."""
    low, high = interval(alarms_, steps // QUIET)
    per_1000 = 1000 / QUIET
    return {
        "alarms": alarms_,
        "steps": steps,
        "per_1000": 1000 * alarms_ / steps,
        "low": low * per_1000,
        "high": high * per_1000,
    }


def calibrated(runs: Sequence[Series]) -> dict[str, float]:
    """Return each detector's threshold for the budget on clean runs: of single signals, then of joint ones."""
    parts = [{name: one(series) for name, one in available(series).items()} for series in runs]
    limits = {name: threshold([each[name].most for each in parts], BUDGET) for name in parts[0]}
    for name, names in JOINT.items():
        limits[name] = threshold([joint(each, names, limits).most for each in parts], BUDGET)
    return limits


class Look:
    """What every detector says of one series."""

    def __init__(self, series: Series, limits: Limits) -> None:
        parts = {name: one(series) for name, one in available(series).items()}
        parts |= {name: joint(parts, names, limits) for name, names in JOINT.items()}
        self.scores: dict[str, Scores] = parts
        self.limits = {name: limits[name] for name in parts}
        fixed = f"{PRACTICE}, as shipped"
        self.scores[fixed], self.limits[fixed] = parts[PRACTICE], 6.0
        if QUANTITY in series:
            self.scores[LIGHT], self.limits[LIGHT] = light(series), 0.5
        told = {name: shipped(series, **options) for name, options in {SHIPPED: {}, **OTHERS}.items()}
        self.events = {name: [one for one in events if one.step > USUAL] for name, events in told.items()}

    def names(self) -> list[str]:
        """Return the detectors, lipcore's alarms as they ship first."""
        return [*self.events, *self.scores]

    def steps(self, name: str) -> list[int]:
        """Return the steps, from 0, of a detector's alarms."""
        if name in self.events:
            return [event.step - 1 for event in self.events[name]]
        return alarms(self.scores[name].most, self.limits[name])

    def first(self, name: str, begin: int, end: int) -> tuple[int, str] | None:
        """Return the first step from `begin` on, before `end`, that a detector is over its limit in, and the layer that
        it names ("" for none); None where there is none."""
        if name in self.events:
            found = [event for event in self.events[name] if begin < event.step <= end]
            return (found[0].step - 1, _layer(found[0].place)) if found else None
        over = np.flatnonzero(self.scores[name].most[begin:end] > self.limits[name])
        if not len(over):
            return None
        step = begin + int(over[0])
        return step, self.scores[name].place(step)


def _layer(place: str) -> str:
    """Return the group of an alarm's place, which is a parameter where something is not finite."""
    return "" if place == "total" else lipcore.by_block(place) if place.endswith(("weight", "bias")) else place


def false_alarms(runs: Sequence[Series], limits: Limits) -> dict[str, Row]:
    """Return each detector's rate of alarms in runs without a fault."""
    looks = [Look(series, limits) for series in runs]
    steps = sum(len(series["loss"]) - USUAL for series in runs)
    return {name: rate(sum(len(look.steps(name)) for look in looks), steps) for name in looks[0].names()}


def faults(runs: Sequence[Mapping[str, Series]], limits: Limits) -> dict[str, dict[str, Row]]:
    """Return by fault and detector: runs, how many were found, the median step of the alarm from 0, how often a layer
    was named and was the right one."""
    found: dict[str, dict[str, Row]] = {}
    for fault in FAULTS:
        firsts: dict[str, list[tuple[int, str] | None]] = {}
        targets = []
        for run in runs:
            begin = len(run["before"]["loss"])
            look = Look(joined(run["before"], run[fault.kind]), limits)
            targets.append(lipcore.by_block(str(run[fault.kind]["target"])))
            for name in look.names():
                first = look.first(name, begin, begin + fault.window)
                firsts.setdefault(name, []).append(None if first is None else (first[0] - begin, first[1]))
        found[fault.name] = {name: _row(each, targets, in_layer=fault.in_layer) for name, each in firsts.items()}
    return found


def _row(firsts: Sequence[tuple[int, str] | None], targets: Sequence[str], *, in_layer: bool) -> Row:
    hits = [(first, target) for first, target in zip(firsts, targets, strict=True) if first is not None]
    row: Row = {"runs": len(firsts), "found": len(hits)}
    row["delay"] = float(np.median([first[0] for first, _ in hits])) if hits else None
    if in_layer:
        row["named"] = sum(bool(first[1]) for first, _ in hits)
        row["right"] = sum(first[1] == target for first, target in hits)
    return row


def totals(of_models: Iterable[Mapping[str, Mapping[str, Row]]]) -> dict[str, Row]:
    """Return each detector's sums over faults and models, without the control, with intervals."""
    found: dict[str, Row] = {}
    control = FAULTS[-1].name
    for by_fault in of_models:
        for fault, rows in by_fault.items():
            for name, row in rows.items():
                sums = found.setdefault(name, dict.fromkeys(_COUNTS, 0))
                if fault == control:
                    sums["control"] += row["found"]
                    sums["controls"] += row["runs"]
                else:
                    for key in ("runs", "found", "named", "right"):
                        sums[key] += row.get(key, 0)
    for sums in found.values():
        sums["low"], sums["high"] = interval(sums["found"], sums["runs"])
        sums["right_low"], sums["right_high"] = interval(sums["right"], sums["named"])
    return found


def samples(runs: Sequence[Mapping[str, Series]]) -> dict[str, Row]:
    """Return in how many runs the sample of a fault in one sample has the greatest loss, or gradient norm, of its
    batch."""
    found = {}
    for fault in FAULTS:
        if fault.in_sample:
            row: Row = {"runs": len(runs)}
            for key in ("sample_loss", "sample_norm"):
                row[key] = sum(int(np.argmax(run[fault.kind][key][0])) == SAMPLE for run in runs)
            found[fault.name] = row
    return found
