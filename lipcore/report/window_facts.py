"""What the closed windows say, in few bins; numbers that are not valid are left out, and counted with their reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipcore.metric.columns import Column, Columns
from lipcore.metric.window import Window
from lipcore.report.binned import Binned
from lipcore.report.parts import named_stage

_BINS = 500
#: Norms of which single steps may be one rank's part, and windows of all ranks have the whole model's.
NORMS = ("grad_norm", "clipped_grad_norm", "update_norm")
_TOGETHER = 256  # windows that are taken in at once

#: Quantities and reducers that sections show, by metric.
WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    "trajectory": {
        "update_ratio": ("mean", "p50", "p99", "max"),
        "path_length": ("cumulative",),
        "chord_length": ("cumulative",),
        "distance": ("last",),
        "directness": ("last",),
        "weight_norm": ("last",),
        "unmoved_steps": ("sum",),
        "nonfinite_steps": ("sum",),
        "nonfinite_elements": ("sum",),
    },
    "lipschitz": {
        "local_lipschitz": ("mean", "p50", "p99", "max"),
        "normalized_gradient_norm": ("mean", "sum"),
        "steadiness": ("max",),
        "sandwich": ("lower", "middle", "upper"),
        "skipped": ("sum",),
    },
    "per_sample_grad_norm": {
        "norm": ("mean", "p50", "p99", "max", "missing"),
        "noise_scale": ("mean", "lower", "upper"),
        "skipped_steps": ("sum",),
    },
    "per_sample_grad_dot": {"dot*": ("mean", "min", "max")},  # "dot", or "dot_0" and so on
    "tensor_stats": {
        "parameter": ("sd", "max", "kurtosis", "zeros", "nonfinite"),
        "gradient": ("sd", "max", "kurtosis", "zeros", "nonfinite"),
        "output": ("sd", "max", "kurtosis", "zeros", "nonfinite"),
        "attention_bound": ("max",),
        "logsumexp": ("mean", "max"),
        "router_entropy": ("mean",),
    },
    "probes": {"local_lipschitz": ("mean", "max"), "regions": ("last",), "region_churn": ("last",)},
}
_NO_QUANTITY: dict[str, tuple[str, ...]] = {}
Key = tuple[str, str, str]  # metric, quantity, reducer


@dataclass
class Off:
    """Windows in which a metric was off."""

    first_step: int  #: of the last windows in a row
    last_step: int
    windows: int  #: of all
    why: str  #: the last reason


@dataclass
class Doubt:
    """Numbers that are not what their key says, and why."""

    windows: int = 0
    places: set[str] = field(default_factory=set)
    last_step: int = 0


class WindowFacts:
    """Numbers of windows by metric, quantity and reducer."""

    def __init__(self, first: int = 0, last: int = 0) -> None:
        self._first, self._last = first, last
        self.count = 0
        self.steps = 0  #: steps that `sums` are of
        self.numbers: dict[Key, Binned] = {}
        self.sums: dict[Key, dict[str, float]] = {}  #: of the reducer "sum", over windows that do not overlap
        self.labels: dict[Key, str] = {}
        self.doubts: dict[tuple[str, str, str], Doubt] = {}  #: by metric, quantity and reason
        self.off: dict[str, Off] = {}  #: metrics that were off in a window, or are
        self.details: dict[str, dict[str, Any]] = {}  #: what each metric said last
        self.metrics: dict[str, list[str]] = {}  #: quantities by metric
        self.scopes: dict[str, int] = {}  #: windows by what they cover
        self.whole: dict[str, list[tuple[int, float, float]]] = {}  #: last step, mean and greatest of :data:`NORMS`
        self.samples: list[float] = []  #: samples per step, as the per-sample metrics count them
        self._counted_to, self._counts, self._last_taken = first - 1, True, -1
        self._waiting: dict[Key, list[tuple[int, tuple[str, ...], tuple[str, ...], np.ndarray[Any, Any]]]] = {}

    def take(self, window: Window) -> None:
        """Take a window in."""
        self.count += 1
        self._counts = window.first_step > self._counted_to  # windows that slide have steps in common
        if self._counts:
            self.steps, self._counted_to = self.steps + window.steps, window.last_step
        self.scopes[window.scope] = self.scopes.get(window.scope, 0) + 1
        self._take_whole(window)
        for metric, why in window.off.items():
            before = self.off.get(metric)
            goes_on = before is not None and before.last_step == self._last_taken
            first = before.first_step if before is not None and goes_on else window.first_step
            self.off[metric] = Off(first, window.last_step, 1 + (before.windows if before else 0), why)
        self._last_taken = window.last_step
        for metric, result in window.results.items():
            self.details[metric] = dict(result.details)
            known = self.metrics.setdefault(metric, [])
            for quantity, values in result.items():
                if quantity not in known:
                    known.append(quantity)
                for part in values.parts:
                    self._take_part(window, metric, quantity, part)

    def is_off(self, metric: str) -> bool:
        """Return whether a metric is off in the last window."""
        found = self.off.get(metric)
        return found is not None and found.last_step == self._last_taken

    def model(self, stage: str) -> str:
        """Return the name of what norms of windows are of; `stage`: what this rank has of a pipeline, or ""."""
        whole = named_stage(stage) if stage else "the model"
        parts = self.scopes.get("shard", 0)
        own = parts + (self.scopes.get("rank", 0) if stage else 0)
        if not own:
            return "the whole model"
        name = f"this rank's part of {whole}" if parts else whole
        if own == self.count:
            return name
        return f"the whole model in {self.count - own:,} windows and of {name} in {own:,}"

    def _take_whole(self, window: Window) -> None:
        trajectory = window.results.get("trajectory")
        if trajectory is None or window.scope != "global":
            return
        for name in NORMS:
            found = trajectory.get(name)
            if found is not None and "total" in found and found["total"].mean.valid:
                norm = found["total"]
                self.whole.setdefault(name, []).append((window.last_step, norm.mean.value, norm.max.value))

    def whole_norm(self, name: str) -> Binned | None:
        """Return one of :data:`NORMS` of the whole model, means and greatest values of the windows of all ranks; None
        where there is none."""
        found = self.whole.get(name)
        if not found:
            return None
        steps, means, greatest = (np.array(column) for column in zip(*found, strict=True))
        line = Binned(self._first, self._last, _BINS)
        line.add(steps.astype(np.int64), ["total"], means[:, None], None, greatest[:, None])
        return line

    def _take_part(self, window: Window, metric: str, quantity: str, part: Columns) -> None:
        quantities = WANTED.get(metric, _NO_QUANTITY)
        wanted = quantities.get(quantity) or quantities.get(f"{quantity.partition('_')[0]}*", ())
        for reducer, column in part.reducers.items():
            self._doubt(window, metric, quantity, part, column)
            if reducer not in wanted:
                continue
            key, count = (metric, quantity, reducer), len(part.places)
            valid = np.broadcast_to(np.asarray(column.valid), (count,))
            numbers = np.where(valid, column.array(count), np.nan)
            self.labels[key] = column.labels if isinstance(column.labels, str) else column.labels[count - 1]
            if reducer == "sum" and self._counts:
                sums = self.sums.setdefault(key, {})
                for place, number in zip(part.places.names, numbers.tolist(), strict=True):
                    sums[place] = sums.get(place, 0.0) + (number if np.isfinite(number) else 0.0)
            waiting = self._waiting.setdefault(key, [])
            if waiting and (len(waiting) >= _TOGETHER or waiting[-1][1] != part.places.names):
                self._add(key)
            waiting.append((window.last_step, part.places.names, part.places.levels, numbers))
            if (metric, quantity, reducer) == ("per_sample_grad_norm", "norm", "mean"):
                counts = np.broadcast_to(np.asarray(column.counts), (count,))
                self.samples.append(float(counts.max()) / max(window.steps, 1))

    def _doubt(self, window: Window, metric: str, quantity: str, part: Columns, column: Column) -> None:
        if column.valid is True:
            return
        valid = np.broadcast_to(np.asarray(column.valid), (len(part.places),))
        for i in np.flatnonzero(~valid).tolist():
            if not column.has(i):
                continue
            note = column.notes if isinstance(column.notes, str) else column.notes[i]
            doubt = self.doubts.setdefault((metric, quantity, note or "no reason was given"), Doubt())
            doubt.places.add(part.places.names[i])
            if doubt.last_step != window.last_step:
                doubt.windows, doubt.last_step = doubt.windows + 1, window.last_step

    def _add(self, key: Key) -> None:
        waiting = self._waiting[key]
        if not waiting:
            return
        if key not in self.numbers:
            self.numbers[key] = Binned(self._first, self._last, _BINS)
        steps = np.array([step for step, _, _, _ in waiting], np.int64)
        values = np.stack([numbers for _, _, _, numbers in waiting])
        self.numbers[key].add(steps, waiting[-1][1], values, levels=waiting[-1][2])
        waiting.clear()

    def finish(self) -> None:
        """Take in what waits; call it once, at the end."""
        for key in self._waiting:
            self._add(key)

    def get(self, metric: str, quantity: str, reducer: str) -> Binned | None:
        """Return a quantity's numbers; None where there are none at all."""
        found = self.numbers.get((metric, quantity, reducer))
        return found if found is not None and found.count.any() else None

    def total(self, metric: str, quantity: str) -> float | None:
        """Return the sum over all windows in all places together; None where nothing was counted."""
        sums = self.sums.get((metric, quantity, "sum"))
        return None if sums is None else sums.get("total", max(sums.values(), default=0.0))
