"""Rows of the ledger as columns of named numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from lipcore.metric.columns import (
    Column,
    Columns,
    CompactRows,
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

QUANTILES = (0.5, 0.99)


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
    valid: Flags | None = None  #: None: where something was counted


class Rows:
    """Rows of the ledger over a window: what they say about tensors, groups and the total.

    Args:
        rows: [places, columns of the ledger].
        quantiles: median and 99 % quantile of update norm and update/weight ratio of every row, [2, 2 * places].
    """

    def __init__(self, places: Places, rows: Tensor, quantiles: Numbers) -> None:
        self.places = places
        self._numbers = CompactRows(rows[:, : COLUMN["group"]].cpu().numpy().T)  # without the last, which is no number
        self._quantiles = quantiles

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._numbers.nbytes + self._quantiles.nbytes

    @cached_property
    def steps(self) -> Counts:
        """Steps in the window."""
        return self["steps"].astype(np.int64)

    @cached_property
    def total_steps(self) -> Counts:
        """Steps since the reference."""
        return self["total_steps"].astype(np.int64)

    @cached_property
    def skipped(self) -> Counts:
        """Steps with values that are not finite."""
        return self["nonfinite_steps"].astype(np.int64)

    @cached_property
    def points(self) -> Counts:
        """Points of the variance."""
        return (self["folded"] + np.maximum(self["points"], 0)).astype(np.int64)

    @cached_property
    def _steps_taken(self) -> int:
        """Steps of the window, those too in which a tensor was left out: groups count a step with finite and other
        members twice."""
        of_tensors = np.array([level == "tensor" for level in self.places.levels])
        each = self.steps + np.where(of_tensors, self.skipped, 0)
        return int(each.max(initial=0))

    def __getitem__(self, column: str) -> Numbers:
        return self._numbers[COLUMN[column]]

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
        notes_of: dict[tuple[bool, int], str | Words] = {}
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
                    if reducer in ("p50", "p99") and counts.any() and np.isnan(numbers).all():
                        continue  # steps were gone before they were read
                    numbers = numbers if counts.all() else np.where(counts > 0, numbers, math.nan)
                    error = errors[quantity] * numbers if quantity in errors else None
                    key = quantity == "variance", id(counts)
                    if key not in notes_of:
                        notes_of[key] = self._notes(quantity, length, counts > 0, "no step observed")
                    notes = notes_of[key]
                    present = known if known is not None and not known.all() else None
                    entries.append(_Entry(name, reducer, numbers, counts, label, notes, error, present))
            if "directness" in wanted:
                label = "exact" if relative_errors is None else "estimate"
                entries += self._directness(length, label)
            _add(result, self.places, entries)

    def _directness(self, length: str, label: Label) -> list[_Entry]:
        known = ~np.isnan(self["total_path"])
        if not known.any():
            return []
        moved = self["total_path"] > 0
        numbers = np.where(moved, self["distance"] / self["total_path"], math.nan)
        notes = self._notes("directness", length, moved, "has not moved")
        present = None if known.all() else known
        return [_Entry("directness", "last", numbers, self.total_steps, label, notes, None, present, moved)]

    def _reducers(self) -> dict[str, dict[str, tuple[Numbers, Counts]]]:
        """Return every reducer's numbers, and how many steps (or points) are in them."""
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
        median, high = self._quantiles[:, 0 if kind == "update" else 1 :: 2]
        numbers = {"last": self[f"{kind}_last"], "mean": mean, "max": self[f"{kind}_max"], "p50": median, "p99": high}
        return {reducer: (number, self.steps) for reducer, number in numbers.items()}

    def _notes(self, quantity: str, length: str, counted: Flags, otherwise: str) -> str | Words:
        if quantity != "variance" and not self.skipped.any() and counted.all():
            return ""
        variance = quantity == "variance"
        sliding = self.points <= self._steps_taken if variance else np.zeros_like(counted)
        facts = np.stack([counted, sliding, self.skipped])
        thinned = variance and length == "chord_length"
        left_out = "elements, which count as unmoved" if variance else "parameters, which were left out"

        def note(counted: int, sliding: int, skipped: int) -> str:
            notes = [f"{skipped} steps had non-finite {left_out}"] if skipped else []
            if thinned:
                notes.append("over the steps that were looked at only")
            if sliding:
                notes.append("the sliding window's start is not among its points")
            return "; ".join(notes) if counted else otherwise

        if (facts == facts[:, :1]).all():
            return note(*facts[:, 0].tolist())
        return words_of([note(*each) for each in facts.T.tolist()])

    def of_norms(self) -> NormRows:
        """Return the rows as norms of something else than updates (of gradients)."""
        columns = ("steps", "nonfinite_steps", "path", "update_last", "update_max")
        return NormRows(self.places, np.stack([*(self[column] for column in columns), *self._quantiles[:, ::2]]))


class NormRows:
    """Norms of one thing over a window.

    Args:
        numbers: [7, places]: steps, steps left out, sum of the norms, the last, the largest, median, 99 % quantile.
    """

    def __init__(self, places: Places, numbers: Numbers) -> None:
        self._places, self._numbers = places, CompactRows(numbers)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._numbers.nbytes

    def add_to(self, result: MetricResult, quantity: str) -> None:
        """Add them as a quantity."""
        steps, skipped = (self._numbers[i].astype(np.int64) for i in range(2))
        total, last, largest, median, high = (self._numbers[i] for i in range(2, 7))
        counted = steps > 0
        with np.errstate(all="ignore"):
            mean = total / steps
        notes: str | Words = "" if counted.all() and not skipped.any() else words_of([
            (f"{left_out} steps had non-finite values, which were left out" if left_out else "") if any_ else
            "none observed" for any_, left_out in zip(counted.tolist(), skipped.tolist(), strict=True)
        ])  # fmt: skip
        numbers = {"last": last, "mean": mean, "max": largest, "p50": median, "p99": high}
        entries = [
            _Entry(quantity, reducer, np.where(counted, norms, math.nan), steps, "exact", notes, None)
            for reducer, norms in numbers.items()
        ]
        _add(result, self._places, entries)


def _add(result: MetricResult, places: Places, entries: Sequence[_Entry]) -> None:
    """Add entries of the same places, of one matrix."""
    if not entries:
        return
    numbers = rows_of(np.stack([entry.numbers for entry in entries]))
    shared: dict[int, tuple[Any, Any]] = {}  # the same counts stand beside many numbers
    by_quantity: dict[str, dict[str, Column]] = {}
    for entry, row in zip(entries, numbers, strict=True):
        if id(entry.counts) not in shared:
            shared[id(entry.counts)] = one_if_same(entry.counts), one_if_same(entry.counts > 0)
        counts, valid = shared[id(entry.counts)]
        valid = valid if entry.valid is None else one_if_same(entry.valid)
        errors = None if entry.errors is None else rows_of(entry.errors[None])[0]
        column = Column(row, counts, entry.label, valid, entry.notes, errors, entry.present)
        by_quantity.setdefault(entry.quantity, {})[entry.reducer] = column
    for quantity, reducers in by_quantity.items():
        result.add_columns(quantity, Columns(places, reducers).where_present())


def quantiles_of(distributions: Sequence[Distribution]) -> Numbers:
    """Return median and 99 % quantile of each, [2, distributions]. Infinite ratios (a weight of norm zero that moved)
    are the largest of all, though the bins do not hold them."""
    found = described(distributions, QUANTILES)
    for i in np.flatnonzero(found[5]).tolist():
        found[6:, i] = [_with_infinite(distributions[i], q) for q in QUANTILES]
    return found[6:]


def _with_infinite(values: Distribution, q: float) -> float:
    rank = math.floor(q * (values.count + values.invalid - 1) + 0.5)
    return values.quantile(rank / max(values.count - 1, 1)) if rank < values.count else math.inf
