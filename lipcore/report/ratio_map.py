"""The map of layers against steps: which layer moved how much of its own size, and when."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipcore.report.alarms_told import worst_first
from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.report.html import Html, Table, html, joined, name_of, number, shortened_name, tag
from lipcore.report.plots import Plots
from lipcore.report.section import Figure
from lipcore.report.sudden import BEFORE, FEWEST, LASTS, compared, most_sudden, stopped_to

KEY, CHOSEN = "ratio-map", "ratio-of-one"
_ROWS = 400  # more would be less than a pixel each
_LABEL = 22  # characters of a row's name beside the map
_SCALE = 1000  # of decimal logarithms, which are sent as 16-bit integers
_BEGUN = 0.7  # of a change, in logarithms: it has begun
_LEAST = 5  # of them; the first bins have none
_NONE, _ZERO = -32768, -32767


@dataclass(frozen=True)
class Sudden:
    """A change of a layer's update over weight norm that needs attention."""

    place: str
    step: int  #: in which it began
    times: float  #: at the most; infinite where the layer stopped moving
    larger: bool
    shared: bool  #: most other layers changed in the same way
    still_to: int | None = None  #: the last step up to which a layer that stopped does not move; None: to the end


@dataclass(frozen=True)
class Looked:
    """Steps and layers that were looked at for sudden changes."""

    first: int | None  #: the step from which on every layer that could be was compared; None where none could be
    never: int  #: layers that moved in too few steps
    fewest: int  #: steps that have to be before a step
    before: int  #: steps that a step is compared with
    lasts: int  #: steps that a fall has to last


class RatioMap:
    """Update over weight norm by layer and step.

    Args:
        ratios: in the bins of the map.
        facts: of the run, for its alarms.
    """

    def __init__(self, ratios: Binned, facts: Facts) -> None:
        self._binned, self._facts = ratios, facts
        together = -(-len(ratios.places) // _ROWS)
        self._groups = [
            list(range(i, min(i + together, len(ratios.places)))) for i in range(0, len(ratios.places), together)
        ]
        self.names = [self._name(group) for group in self._groups]
        #: [bins, rows]
        self.low, self.high = (self._reduced(a, f) for a, f in ((ratios.low, np.fmin), (ratios.high, np.fmax)))
        self.mean = self._mean(ratios.mean)
        #: Whether a cell has a step that is not finite; [bins, rows].
        self.lost = np.stack([self._lost(group) for group in self._groups], axis=1)
        self.usual = [_median(column) for column in self.mean.T]
        #: Decimal logarithm of each cell over what the row was in the bins before: of its greatest or its least value,
        #: whichever is further away.
        self.away = _further(_away(self.high), _away(self.low))
        self.sudden = self._sudden()
        self.looked = self._looked()
        self.start = self._most_unusual()

    def _name(self, group: list[int]) -> str:
        first = self._binned.places[group[0]]
        return first if len(group) == 1 else f"{first} and {len(group) - 1} after it"

    def _lost(self, group: list[int]) -> Any:
        """Return which bins of a row have a step that is not finite: one without any number is not measured."""
        lost, count = self._binned.lost[:, group], self._binned.count[:, group]
        return (lost[:, count.any(0)] > 0).any(1)

    def _reduced(self, array: Any, function: np.ufunc) -> Any:
        return np.stack([function.reduce(array[:, group], axis=1) for group in self._groups], axis=1)

    def _mean(self, means: Any) -> Any:
        counts = np.stack([np.isfinite(means[:, group]).sum(1) for group in self._groups], axis=1)
        sums = np.stack([np.nansum(means[:, group], axis=1) for group in self._groups], axis=1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def _most_unusual(self) -> tuple[int, int]:
        """Return bin and row of an alarm, of a sudden change, or of the cell that is furthest from the bins before."""
        for event in worst_first(self._facts.alarms):
            row = self._row(str(event.data.get("place", "")))
            if row is not None:
                return self._bin(event.step), row
        if self.sudden is not None:
            return self._bin(self.sudden.step), self.names.index(self.sudden.place)
        away = np.where(np.isfinite(self.away), np.abs(self.away), -1)
        at, row = (int(i) for i in np.unravel_index(int(away.argmax()), away.shape))
        return self._begin(at, row), row

    def _begin(self, at: int, row: int) -> int:
        """Return the bin in which a cell's distance from the bins before began."""
        most, begun = self.away[at, row], at
        while begun > 0 and most and self.away[begun - 1, row] / most >= _BEGUN:
            begun -= 1
        return begun

    def _sudden(self) -> Sudden | None:
        """Return the change that needs attention; None where there is none."""
        change = most_sudden(self.high)
        if change is None:
            return None
        name, larger = self.names[change.row], change.log > 0
        begun = self._begin(change.bin, change.row) if larger else change.bin
        step = self._step(begun, change.row) if larger else self._binned.first + begun * self._binned.width
        still = stopped_to(self.high, begun, change.row) if np.isinf(change.log) else None
        still_to = None if still is None else int(self._binned.ends[still])
        return Sudden(name, step, float(10 ** abs(change.log)), larger, change.shared, still_to)

    def _looked(self) -> Looked:
        found, width = compared(self.high), self._binned.width
        known = found.any(0)
        last = int(found[:, known].argmax(0).max()) if known.any() else None
        first = None if last is None else self._binned.first + last * width
        return Looked(first, int((~known).sum()), FEWEST * width, BEFORE * width, LASTS * width)

    def _step_away(self, at: int, row: int) -> int:
        return self._step(at, row) if self.away[at, row] > 0 else int(self._binned.ends[at])

    def _bin(self, step: int) -> int:
        return int(np.clip((step - self._binned.first) // self._binned.width, 0, self._binned.bins - 1))

    def _row(self, place: str) -> int | None:
        """Return the row of a place, or that of the group that a parameter is in, or the first one of a group."""
        places = self._binned.places
        if place in places:
            found = places.index(place)
        else:
            inside = [
                i for i, each in enumerate(places) if place.startswith(f"{each}.") or each.startswith(f"{place}.")
            ]
            if not inside:
                return None
            found = inside[0]
        return next(i for i, group in enumerate(self._groups) if found in group)

    def look_at(self, step: int, place: str) -> None:
        """Have the page begin at a step and a place, where the map has that."""
        row = self._row(place)
        if row is not None:
            self.start = self._bin(step), row

    def marks(self) -> list[tuple[int, int]]:
        """Return step and row of the alarms that are of a layer."""
        found = ((event.step, self._row(str(event.data.get("place", "")))) for event in self._facts.alarms)
        return [(step, row) for step, row in found if row is not None][:200]

    def figures(self, plots: Plots) -> list[Figure]:
        """Draw the map and the figure of one of its rows."""
        height = int(np.clip(13 * len(self.names), 70, 520)) + 40
        labels = [shortened_name(name, _LABEL) for name in self.names]
        plots.map(KEY, labels, self.marks(), height=height)
        below = Html(_BELOW % (_LOST if self.lost.any() else ""))
        _, row = self.start
        low, mean, high = (array[:, row] for array in (self.low, self.mean, self.high))
        span = np.concatenate([self.low.ravel(), self.high.ravel()])
        span = span[np.isfinite(span) & (span > 0)]
        plots.chosen(CHOSEN, "update / weight", self._binned.ends, low, mean, high, span)
        part = f", of {self._facts.covered.model}" if self._facts.covered.partial else ""
        title = f"How much each layer moved: update over weight norm{part}"
        return [
            Figure(KEY, title, self._sentence(), self._table(), below),
            Figure(CHOSEN, "One layer of the map", tag("span", "Click a cell of the map.", id="chosen")),
        ]

    def _sentence(self) -> Html:
        at, row = self.start
        away = self.away[at, row]
        if not np.isfinite(self.high).any():
            return html("The map has no number yet.")
        key = "White: as in the steps before; orange: larger, blue: smaller. "
        if not np.isfinite(away):
            return html(key)
        what = f"{number(_times(away))} times {'larger' if away > 0 else 'smaller'}"
        said = f" at step {self._step_away(at, row):,}, {what} than before."
        alone = self.sudden is None and not self.marks()
        most = "Furthest from the steps before: " if alone else "Most unusual: "
        layer = "layer " if self.names[row].isdigit() else ""
        return joined([key, most, layer, name_of(self.names[row]), said])

    def _step(self, at: int, row: int) -> int:
        own = [(self._binned.high[at, i], int(self._binned.at_high[at, i])) for i in self._groups[row]]
        return max((pair for pair in own if np.isfinite(pair[0])), default=(0.0, int(self._binned.ends[at])))[1]

    def _table(self) -> Table:
        rows: list[tuple[float, Sequence[object]]] = []
        for row, name in enumerate(self.names):
            column = self.high[:, row]
            if not np.isfinite(column).any():
                rows.append((-1.0, (name_of(name), "none", "none", "", "")))
                continue
            at, usual = int(np.nanargmax(column)), self.usual[row]
            times = float(column[at] / usual) if usual > 0 else np.nan
            cells = number(usual), number(float(column[at])), number(times), f"{self._step(at, row):,}"
            rows.append((times if np.isfinite(times) else 0.0, (name_of(name), *cells)))
        rows.sort(key=lambda pair: -pair[0])
        return Table(("layer", "median", "greatest", "times the median", "at step"), [cells for _, cells in rows])

    def json(self) -> dict[str, Any]:
        """Return what the page's script colours."""
        return {
            "key": KEY, "chosen": CHOSEN, "names": self.names, "bins": self._binned.bins,
            "first": self._binned.first, "last": self._binned.last, "width": self._binned.width, "start": self.start,
            "usual": [None if not np.isfinite(u) else u for u in self.usual], "scale": _SCALE,
            "away": _packed_logs(self.away), "lost": _text(self.lost),
            **{name: _packed(a) for name, a in (("low", self.low), ("mean", self.mean), ("high", self.high))},
        }  # fmt: skip


_LOST = '<span class="box lost"></span>not finite'
_BELOW = (
    '<div class="legend"><span id="map-low"></span><canvas id="map-colors" width="256" height="10"></canvas>'
    '<span id="map-high"></span><span class="box none"></span>no number <span class="box zero"></span>did not move%s'
    '<label><input type="checkbox" id="map-relative" checked> compared with the steps before</label></div>'
    '<p id="map-told" aria-live="polite">Point at a cell, or go there with the arrow keys; Enter or a click shows the '
    "layer below.</p>"
)


def _packed(values: Any) -> str:
    """Return decimal logarithms, [rows, bins] of little-endian int16, as base64."""
    with np.errstate(all="ignore"):
        logs = np.round(_SCALE * np.log10(values))
    found = np.where(np.isnan(values), _NONE, np.where(values <= 0, _ZERO, np.clip(logs, -32000, 32000)))
    return _text(found)


def _packed_logs(logs: Any) -> str:
    """Return decimal logarithms in the same way."""
    return _text(np.where(np.isnan(logs), _NONE, np.clip(np.round(_SCALE * np.nan_to_num(logs)), -32000, 32000)))


def _text(found: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(found.T).astype("<i2").tobytes()).decode()


def _times(away: float) -> float:
    """Return the factor of a decimal logarithm, as the page's script has it."""
    return float(10 ** (round(_SCALE * abs(away)) / _SCALE))


def _away(values: Any) -> Any:
    """Return the decimal logarithm of numbers [bins, rows] over the median of the bins before; NaN where one is not
    positive, or has too few before it."""
    with np.errstate(all="ignore"):
        logs = np.log10(np.where(values > 0, values, np.nan))
    before = np.pad(logs, ((BEFORE, 0), (0, 0)), constant_values=np.nan)[:-1]
    windows = np.lib.stride_tricks.sliding_window_view(before, BEFORE, axis=0)
    enough = np.isfinite(windows).sum(-1) >= _LEAST
    usual = np.full(logs.shape, np.nan)
    if enough.any():
        usual[enough] = np.nanmedian(windows[enough], axis=-1)
    found: Any = logs - usual
    return found


def _further(one: Any, other: Any) -> Any:
    """Return whichever of two numbers is further from 0; NaN counts for nothing."""
    return np.where(np.isnan(one) | (np.abs(other) > np.abs(one)), other, one)


def _median(column: Any) -> float:
    finite = column[np.isfinite(column)]
    return float(np.median(finite)) if len(finite) else float("nan")
