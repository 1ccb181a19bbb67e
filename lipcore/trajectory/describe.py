"""Rows of the ledger as named values."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lipcore.metric.distribution import Distribution
from lipcore.metric.results import Label, Level, MetricResult, Value

#: From the update alone.
MOVES = (
    *("update_norm", "update_ratio", "max_abs_update", "path_length", "weight_norm"),
    *("unmoved_steps", "nonfinite_steps", "nonfinite_elements"),
)
#: From where the parameters are, relative to the reference and to their mean.
OFFSETS = ("distance", "directness", "variance")
#: Of the batch's gradient: as backward left it, and as the optimizer got it.
GRADIENTS = ("grad_norm", "clipped_grad_norm")


class Row:
    """One row of the ledger over a window: what it says about one tensor, group or the total."""

    def __init__(self, row: dict[str, float], updates: Distribution, ratios: Distribution) -> None:
        self.row, self.updates, self.ratios = row, updates, ratios
        self.steps, self.total_steps = int(row["steps"]), int(row["total_steps"])
        self.points = int(row["folded"] + max(row["points"], 0))
        self.skipped = int(row["nonfinite_steps"])

    def add_to(
        self,
        result: MetricResult,
        place: str,
        level: Level,
        wanted: frozenset[str],
        *,
        length: str = "path_length",
        relative_error: Mapping[str, float] | None = None,
    ) -> None:
        """All wanted quantities. `length` is what the sum of update norms is called; `relative_error` holds the
        standard error of each quantity over its value, for estimates."""
        row = self.row
        for quantity, reducers in self._numbers().items():
            if quantity not in wanted:
                continue
            label: Label = "exact"
            error = None
            if relative_error is not None and quantity in relative_error:
                label, error = "estimate", relative_error[quantity]
            values = {}
            note = self._note(quantity, length)
            for reducer, (number, count) in reducers.items():
                if reducer == "cumulative" and math.isnan(number):
                    continue  # of shards, after the window they were merged in
                value, why = (number, note) if count else (math.nan, "no step observed")
                standard_error = None if error is None else error * value
                values[reducer] = Value(value, count, label, count > 0, why, standard_error)
            result.add(length if quantity == "path_length" else quantity, place, level, **values)
        if "directness" in wanted and not math.isnan(row["total_path"]):
            moved = row["total_path"] > 0
            number = row["distance"] / row["total_path"] if moved else math.nan
            label = "exact" if relative_error is None else "estimate"
            why = self._note("directness", length) if moved else "has not moved"
            result.add("directness", place, level, last=Value(number, self.total_steps, label, moved, why))

    def _numbers(self) -> dict[str, dict[str, tuple[float, int]]]:
        row, steps, total = self.row, self.steps, self.total_steps
        mean = 1 / steps if steps else math.nan
        seen = steps + self.skipped
        known = max(steps, total)  # a new reference starts the total anew
        return {
            "update_norm": self._norms("update", row["path"] * mean, self.updates),
            "update_ratio": self._norms("ratio", row["ratio_sum"] * mean, self.ratios),
            "max_abs_update": {"last": (row["max_abs_last"], steps), "max": (row["max_abs_max"], steps)},
            "path_length": {"sum": (row["path"], steps), "cumulative": (row["total_path"], total)},
            "distance": {"last": (row["distance"], known)},
            "variance": {"last": (row["m2"] / max(self.points, 1), self.points if steps else 0)},
            "weight_norm": {"last": (row["weight"], known)},
            "unmoved_steps": {"sum": (row["zero_steps"], steps)},
            "nonfinite_steps": {"sum": (row["nonfinite_steps"], seen)},
            "nonfinite_elements": {"sum": (row["nonfinite_elements"], seen)},
        }

    def _note(self, quantity: str, length: str) -> str:
        notes = [f"{self.skipped} steps had non-finite parameters, which were left out"] if self.skipped else []
        if quantity == "variance" and length == "chord_length":
            notes.append("over the steps that were looked at only")
        if quantity == "variance" and self.points <= self.steps:
            notes.append("the sliding window's start is not among its points")
        return "; ".join(notes)

    def _norms(self, kind: str, mean: float, values: Distribution) -> dict[str, tuple[float, int]]:
        numbers = {"last": self.row[f"{kind}_last"], "mean": mean, "max": self.row[f"{kind}_max"]}
        numbers |= {"p50": _quantile(values, 0.5), "p99": _quantile(values, 0.99)}
        return {reducer: (number, self.steps) for reducer, number in numbers.items()}

    def norms(self) -> dict[str, Value]:
        """The row as norms of something else than updates (of gradients)."""
        steps = self.steps
        note = f"{self.skipped} steps had non-finite values, which were left out" if self.skipped else ""
        numbers = self._norms("update", self.row["path"] / steps if steps else math.nan, self.updates)
        return {
            reducer: Value(number if count else math.nan, count, "exact", count > 0, note if count else "none observed")
            for reducer, (number, count) in numbers.items()
        }


def _quantile(values: Distribution, q: float) -> float:
    """Infinite ratios (a weight of norm zero that moved) are the largest of all, though the bins do not hold them."""
    if not values.invalid:
        return values.quantile(q)
    rank = math.floor(q * (values.count + values.invalid - 1) + 0.5)
    return values.quantile(rank / max(values.count - 1, 1)) if rank < values.count else math.inf
