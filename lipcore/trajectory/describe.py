"""Rows of the ledger as columns of named numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lipcore.metric.columns import (
    Column,
    Columns,
    Counts,
    Flags,
    Numbers,
    Places,
    Words,
    one_if_same,
    rows_of,
    words_of,
)
from lipcore.metric.distribution import Distribution, described
from lipcore.metric.results import Label, MetricResult
from lipcore.trajectory.table import COLUMN

#: From the update alone.
MOVES = (
    *("update_norm", "update_ratio", "max_abs_update", "path_length", "weight_norm"),
    *("unmoved_steps", "nonfinite_steps", "nonfinite_elements"),
)
#: From where the parameters are, relative to the reference and to their mean.
OFFSETS = ("distance", "directness", "variance")
#: Of the batch's gradient: as backward left it, and as the optimizer got it.
GRADIENTS = ("grad_norm", "clipped_grad_norm")

_QUANTILES = (0.5, 0.99)


@dataclass
class _Entry:
    """A column in the making."""

    quantity: str
    reducer: str
    numbers: Numbers
    counts: Counts
    label: Label
    notes: str | Words
    errors: Numbers | None
    present: Flags | None = None


class Rows:
    """Rows of the ledger over a window: what they say about tensors, groups and the total.

    Args:
        rows: [places, columns of the ledger].
        distributions: update norm and update/weight ratio of every row.
    """

    def __init__(self, places: Places, rows: Tensor, distributions: Sequence[Distribution]) -> None:
        self.places = places
        self.numbers: Numbers = np.ascontiguousarray(rows.cpu().numpy().T)
        self.quantiles = _quantiles(distributions)
        self.steps, self.total_steps, self.skipped = (
            self[name].astype(np.int64) for name in ("steps", "total_steps", "nonfinite_steps")
        )
        self.points: Counts = (self["folded"] + np.maximum(self["points"], 0)).astype(np.int64)

    def __getitem__(self, column: str) -> Numbers:
        return self.numbers[COLUMN[column]]  # type: ignore[no-any-return]

    def add_to(
        self,
        result: MetricResult,
        wanted: frozenset[str],
        *,
        length: str = "path_length",
        relative_errors: Mapping[str, Numbers] | None = None,
    ) -> None:
        """Add all wanted quantities. `length` is what the sum of update norms is called; `relative_errors` holds the
        standard error of each quantity over its value, for estimates."""
        entries = []
        errors = relative_errors or {}
        with np.errstate(all="ignore"):
            for quantity, reducers in self._reducers().items():
                if quantity not in wanted:
                    continue
                label: Label = "estimate" if quantity in errors else "exact"
                name = length if quantity == "path_length" else quantity
                for reducer, (numbers, counts) in reducers.items():
                    # Of shards it is not known after the window they were merged in.
                    known = ~np.isnan(numbers) if reducer == "cumulative" else None
                    if known is not None and not known.any():
                        continue
                    numbers = np.where(counts > 0, numbers, math.nan)
                    error = errors[quantity] * numbers if quantity in errors else None
                    notes = self._notes(quantity, length, counts > 0, "no step observed")
                    present = known if known is not None and not known.all() else None
                    entries.append(_Entry(name, reducer, numbers, counts, label, notes, error, present))
            _add(result, self.places, entries)
            if "directness" in wanted:
                self._add_directness(result, length, "exact" if relative_errors is None else "estimate")

    def _add_directness(self, result: MetricResult, length: str, label: Label) -> None:
        known = np.flatnonzero(~np.isnan(self["total_path"]))
        if not len(known):
            return
        moved = self["total_path"] > 0
        numbers = np.where(moved, self["distance"] / self["total_path"], math.nan)
        notes = self._notes("directness", length, moved, "has not moved")
        every = len(known) == len(self.places)
        if not every and isinstance(notes, Words):
            notes = words_of([notes[i] for i in known])
        columns = Column(
            rows_of(numbers[None, known])[0], one_if_same(self.total_steps[known]), label,
            one_if_same(moved[known]), notes,
        )  # fmt: skip
        places = self.places if every else self.places.at(known.tolist())
        result.add_columns("directness", Columns(places, {"last": columns}))

    def _reducers(self) -> dict[str, dict[str, tuple[Numbers, Counts]]]:
        """Numbers and how many steps (or points) are in them."""
        steps, total = self.steps, self.total_steps
        mean = np.where(steps > 0, 1 / steps, math.nan)
        seen = steps + self.skipped
        known = np.maximum(steps, total)  # a new reference starts the total anew
        variance = self["m2"] / np.maximum(self.points, 1)
        return {
            "update_norm": self._norms("update", self["path"] * mean),
            "update_ratio": self._norms("ratio", self["ratio_sum"] * mean),
            "max_abs_update": {"last": (self["max_abs_last"], steps), "max": (self["max_abs_max"], steps)},
            "path_length": {"sum": (self["path"], steps), "cumulative": (self["total_path"], total)},
            "distance": {"last": (self["distance"], known)},
            "variance": {"last": (variance, np.where(steps > 0, self.points, 0))},
            "weight_norm": {"last": (self["weight"], known)},
            "unmoved_steps": {"sum": (self["zero_steps"], steps)},
            "nonfinite_steps": {"sum": (self["nonfinite_steps"], seen)},
            "nonfinite_elements": {"sum": (self["nonfinite_elements"], seen)},
        }

    def _norms(self, kind: str, mean: Numbers) -> dict[str, tuple[Numbers, Counts]]:
        median, high = self.quantiles[0 if kind == "update" else 1]
        numbers = {"last": self[f"{kind}_last"], "mean": mean, "max": self[f"{kind}_max"], "p50": median, "p99": high}
        return {reducer: (number, self.steps) for reducer, number in numbers.items()}

    def _notes(self, quantity: str, length: str, counted: Flags, otherwise: str) -> str | Words:
        sliding = self.points <= self.steps if quantity == "variance" else np.zeros_like(counted)
        facts = np.stack([counted, sliding, self.skipped])
        thinned = quantity == "variance" and length == "chord_length"

        def note(counted: int, sliding: int, skipped: int) -> str:
            notes = [f"{skipped} steps had non-finite parameters, which were left out"] if skipped else []
            if thinned:
                notes.append("over the steps that were looked at only")
            if sliding:
                notes.append("the sliding window's start is not among its points")
            return "; ".join(notes) if counted else otherwise

        if (facts == facts[:, :1]).all():
            return note(*facts[:, 0].tolist())
        return words_of([note(*each) for each in facts.T.tolist()])

    def add_norms_to(self, result: MetricResult, quantity: str) -> None:
        """Add the rows as norms of something else than updates (of gradients)."""
        with np.errstate(all="ignore"):
            mean = np.where(self.steps > 0, self["path"] / self.steps, math.nan)
        counted = self.steps > 0
        notes: str | Words = "" if counted.all() and not self.skipped.any() else words_of([
            (f"{skipped} steps had non-finite values, which were left out" if skipped else "") if any_ else
            "none observed" for any_, skipped in zip(counted.tolist(), self.skipped.tolist(), strict=True)
        ])  # fmt: skip
        entries = [
            _Entry(quantity, reducer, np.where(counted, numbers, math.nan), counts, "exact", notes, None)
            for reducer, (numbers, counts) in self._norms("update", mean).items()
        ]
        _add(result, self.places, entries)


def _add(result: MetricResult, places: Places, entries: Sequence[_Entry]) -> None:
    """Entries of the same places, of one matrix."""
    if not entries:
        return
    numbers = rows_of(np.stack([entry.numbers for entry in entries]))
    shared: dict[int, tuple[Any, Any]] = {}  # the same counts stand beside many numbers
    by_quantity: dict[str, dict[str, Column]] = {}
    for entry, row in zip(entries, numbers, strict=True):
        if id(entry.counts) not in shared:
            shared[id(entry.counts)] = one_if_same(entry.counts), one_if_same(entry.counts > 0)
        counts, valid = shared[id(entry.counts)]
        errors = None if entry.errors is None else rows_of(entry.errors[None])[0]
        column = Column(row, counts, entry.label, valid, entry.notes, errors, entry.present)
        by_quantity.setdefault(entry.quantity, {})[entry.reducer] = column
    for quantity, reducers in by_quantity.items():
        result.add_columns(quantity, Columns(places, reducers))


def _quantiles(distributions: Sequence[Distribution]) -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """Median and 99 % quantile of update norms, and of ratios. Infinite ratios (a weight of norm zero that moved) are
    the largest of all, though the bins do not hold them."""
    found = described(distributions, _QUANTILES)
    for i in np.flatnonzero(found[5]):
        found[6:, i] = [_with_infinite(distributions[i], q) for q in _QUANTILES]
    updates, ratios = found[6:, ::2], found[6:, 1::2]
    return (updates[0], updates[1]), (ratios[0], ratios[1])


def _with_infinite(values: Distribution, q: float) -> float:
    rank = math.floor(q * (values.count + values.invalid - 1) + 0.5)
    return values.quantile(rank / max(values.count - 1, 1)) if rank < values.count else math.inf
