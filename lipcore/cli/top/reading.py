"""What is shown of a run: its last steps, read from the record; nothing is written."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipcore.metric.window import Window
from lipcore.recording.run import Event, Run
from lipcore.report.covered import Covered, covered
from lipcore.report.html import number
from lipcore.report.stretch import Stretch, stretch

Array = np.ndarray[Any, Any]
STEPS = 2048  #: that lines go back at most
_LAYER_STEPS = 256  # of these the layers' numbers
_NOW = 10  # steps in which a layer is looked for that is not as usual
_TOTALS = {
    "trajectory/grad_norm": "gradient norm",
    "trajectory/clipped_grad_norm": "clipped to",
    "trajectory/update_norm": "update norm",
    "trajectory/weight_norm": "weight norm",
}
_MOST_LOGGED = 5
_SECONDS = 30  # over which the rate of steps is taken


@dataclass(frozen=True)
class Line:
    """One number of the whole model over the last steps."""

    name: str
    values: Array  #: [steps], NaN where there is none

    @property
    def last(self) -> float:
        """The newest number, NaN where it is not finite; so where there is none."""
        return float(self.values[-1]) if len(self.values) else math.nan


@dataclass(frozen=True)
class Layer:
    """Update over weight norm of a layer: the last one, the median of the steps before, and the one of the last 10 that
    is furthest from that."""

    name: str
    last: float
    usual: float
    times: float  #: infinite where it is not finite
    values: Array

    @property
    def heat(self) -> float:
        """Distance from what is usual, in logarithms."""
        return abs(math.log(self.times)) if 0 < self.times < math.inf else math.inf if self.times == math.inf else 0.0


@dataclass
class Seen:
    """A run as it is now."""

    name: str
    step: int
    being_written: bool
    rate: float = math.nan  #: steps per second
    model: str = ""
    alarms_on: bool = False
    lines: Sequence[Line] = ()
    layers: Sequence[Layer] = ()  #: the hottest first
    events: Sequence[Event] = ()  #: the newest first
    trouble: str = ""  #: why it could not be read
    restarts: int = 0
    span: tuple[int, int] = field(default=(0, 0))  #: steps of the lines
    covered: Covered = field(default_factory=Covered)
    whole: str = ""  #: norms of the whole model, where the lines' are of a part


class Pace:
    """Steps per second, by what was seen in the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=64)

    def rate(self, step: int, now: float, otherwise: float) -> float:
        """Take a look in; return the rate, or another one where too little was seen."""
        if self._seen and step < self._seen[-1][1]:  # a run that has begun anew, or was rewound
            self._seen.clear()
        self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _SECONDS:
            self._seen.popleft()
        (begin, first), seconds = self._seen[0], now - self._seen[0][0]
        if step == first:
            return 0.0 if seconds >= _SECONDS else otherwise
        return (step - first) / (now - begin)


def look(run: Run, pace: Pace, now: float | None = None) -> Seen:
    """Read a run as it is now."""
    with run.as_of_now():
        last, starts, events = run.last_step, run.starts, run.events
        config = starts[-1].config if starts else {}
        seen = Seen(run.name, last, run.being_written, model=str(config.get("model", "")))
        seen.alarms_on = config.get("alarms", "off") != "off"
        seen.restarts = len(starts) - 1 if starts else 0
        seen.rate = pace.rate(last, time.monotonic() if now is None else now, run.steps_per_second)
        seen.events = list(reversed(events))
        seen.covered = covered(starts)
        window = run.last_whole_window() if seen.covered.partial else None
        seen.whole = "" if window is None else _whole(window)
        if not last:
            return seen
        first = max(run.first_step, last - STEPS + 1)
        seen.span = first, last
        names = run.step_quantities
        logged = [name for name in names if name.startswith("logged/")]
        logged = sorted(logged, key=lambda name: name != "logged/loss")[:_MOST_LOGGED]
        wanted = {name: name.partition("/")[2] for name in logged} | {k: v for k, v in _TOTALS.items() if k in names}
        found = {name: stretch(run, name, first, last) for name in wanted}
        seen.lines = [Line(wanted[name], _total(one)) for name, one in found.items() if one.at("total")]
        update, weight = (found.get(f"trajectory/{name}_norm") for name in ("update", "weight"))
        if update is not None and weight is not None:
            seen.layers = _layers(update, weight)
    return seen


def _whole(window: Window) -> str:
    """Return the mean norms of the whole model in a window of all ranks, in words; "" where there are none."""
    trajectory = window.results.get("trajectory")
    said = []
    for full, words in _TOTALS.items():
        quantity = None if trajectory is None else trajectory.get(full.partition("/")[2])
        norm = None if quantity is None or "total" not in quantity else quantity["total"]
        value = None if norm is None else norm.get("mean") or norm.get("last")
        if value is not None and value.valid:
            said.append(f"{words} {number(value.value)}")
    return f"whole model, steps {window.first_step:,} to {window.last_step:,}: {', '.join(said)}" if said else ""


def _total(found: Stretch) -> Array:
    values = found.values[:, found.at("total")[0]]
    known = np.flatnonzero(found.there)
    return values[: known[-1] + 1] if len(known) else values[:0]


def _layers(update: Stretch, weight: Stretch) -> list[Layer]:
    level = next((level for level in ("group", "tensor", "total") if update.at(level)), "total")
    rows = np.flatnonzero(update.there & weight.there)[-_LAYER_STEPS:]
    found = []
    for column in update.at(level):
        place = update.places[column]
        if place not in weight.places or not len(rows):
            continue
        over = weight.values[rows, weight.places.index(place)]
        with np.errstate(all="ignore"):
            ratios = np.where(over > 0, update.values[rows, column] / over, np.nan)
        found.append(_layer(place, ratios))
    return sorted(found, key=lambda layer: -layer.heat)


def _layer(place: str, ratios: Array) -> Layer:
    now, before = ratios[-_NOW:], ratios[:-_NOW]
    before = before[np.isfinite(before) & (before > 0)]
    usual = float(np.median(before)) if len(before) >= _NOW else math.nan
    if not np.isfinite(now).all() and np.isfinite(ratios).any():
        return Layer(place, float(ratios[-1]), usual, math.inf, ratios)
    known = now[np.isfinite(now) & (now > 0)]
    times = 1.0
    if usual > 0 and len(known):
        logs = np.log(known / usual)
        times = float(np.exp(logs[np.argmax(np.abs(logs))]))
    return Layer(place, float(ratios[-1]), usual, times, ratios)
