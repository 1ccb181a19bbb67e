"""A number and what it is worth, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Label = Literal["exact", "one-sided", "heuristic", "estimate"]
Level = Literal["tensor", "group", "total"]
LABELS: tuple[Label, ...] = get_args(Label)
LEVELS: tuple[Level, ...] = get_args(Level)
_WORTH: dict[Label, int] = {"exact": 0, "estimate": 1, "one-sided": 2, "heuristic": 3}


def weakest(labels: Iterable[Label]) -> Label:
    """Return the label of a number made from several."""
    return max(labels, key=_WORTH.__getitem__)


@dataclass(frozen=True)
class Value:
    """One number and what it is worth."""

    value: float
    count: int  #: how many observations it was reduced from
    label: Label = "exact"  #: exact; one-sided (a bound); heuristic (no theorem says what it is); estimate (see error)
    valid: bool = True  #: False when the number does not mean what its key says; `note` says why
    note: str = ""
    error: float | None = None  #: standard error of an estimate

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready: a value that is not finite becomes None."""
        value = self.value if math.isfinite(self.value) else None
        out: dict[str, Any] = {"value": value, "count": self.count, "label": self.label, "valid": self.valid}
        if self.error is not None:
            out["error"] = self.error if math.isfinite(self.error) else None
        return out | {"note": self.note} if self.note else out

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Value:
        """Restore what :meth:`to_dict` gave; None becomes NaN."""
        value, error = state["value"], state.get("error", 0.0)
        return cls(
            math.nan if value is None else float(value),
            int(state["count"]),
            state["label"],
            bool(state["valid"]),
            state.get("note", ""),
            None if "error" not in state else math.nan if error is None else float(error),
        )


def json_ready(value: Any, digits: int | None = None) -> Any:
    """Return numbers, arrays, Values, and mappings and lists of them, as JSON has them: None for what is not finite.

    >>> json_ready({"a": [1.23456, float("inf")], "b": (True, "c")}, digits=3)
    {'a': [1.23, None], 'b': [True, 'c']}
    """
    if isinstance(value, Value):
        return json_ready(value.to_dict(), digits)
    if isinstance(value, (np.ndarray, np.generic)):
        return json_ready(value.tolist(), digits)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: json_ready(part, digits) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(part, digits) for part in value]
    return value


def suffix_maximum(values: Sequence[float]) -> list[float]:
    """Return max of values[i:] for every i; NaN counts for nothing, and stands where no number follows.

    >>> suffix_maximum([1.0, 3.0, float("nan"), 2.0, float("nan")])
    [3.0, 3.0, 2.0, 2.0, nan]
    """
    highest, curve = math.nan, []
    for value in reversed(values):
        if not value <= highest and not math.isnan(value):
            highest = value
        curve.append(highest)
    return curve[::-1]
