"""What metrics return: values that say what they are worth, and windows of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Label = Literal["exact", "one-sided", "heuristic", "estimate"]
Level = Literal["tensor", "group", "total"]
_LEVELS = ("tensor", "group", "total")
_WORTH: dict[Label, int] = {"exact": 0, "estimate": 1, "one-sided": 2, "heuristic": 3}


def weakest(labels: Iterable[Label]) -> Label:
    """The label of a number made from several."""
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
        """JSON-ready: a value that is not finite becomes None."""
        value = self.value if math.isfinite(self.value) else None
        out: dict[str, Any] = {"value": value, "count": self.count, "label": self.label, "valid": self.valid}
        if self.error is not None:
            out["error"] = self.error if math.isfinite(self.error) else None
        return out | {"note": self.note} if self.note else out


def json_ready(value: Any, digits: int | None = None) -> Any:
    """Numbers, arrays, Values, and dicts and lists of them, as JSON has them: None for what is not finite.

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
    if isinstance(value, dict):
        return {key: json_ready(part, digits) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(part, digits) for part in value]
    return value


def suffix_maximum(values: Sequence[float]) -> list[float]:
    """max of values[i:] for every i; NaN counts for nothing, and stands where no number follows.

    >>> suffix_maximum([1.0, 3.0, float("nan"), 2.0, float("nan")])
    [3.0, 3.0, 2.0, 2.0, nan]
    """
    highest, curve = math.nan, []
    for value in reversed(values):
        if not value <= highest and not math.isnan(value):
            highest = value
        curve.append(highest)
    return curve[::-1]


class Reduced(Mapping[str, Value]):
    """The reducers of one quantity in one place: ``update_norm["layers.0"].max``, or ``["max"]``."""

    def __init__(self, **reducers: Value) -> None:
        self._reducers = reducers

    def __getitem__(self, reducer: str) -> Value:
        return self._reducers[reducer]

    def __getattr__(self, reducer: str) -> Value:
        try:
            return self.__dict__["_reducers"][reducer]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(
                f"no reducer {reducer!r}; this quantity has {', '.join(self.__dict__.get('_reducers', ()))}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._reducers)

    def __len__(self) -> int:
        return len(self._reducers)

    def __repr__(self) -> str:
        return f"Reduced({', '.join(f'{k}={v.value:.6g}' for k, v in self._reducers.items())})"


class Quantity(Mapping[str, Reduced]):
    """One quantity of a metric in all its places: parameter names, group names, "total", or the output it refers to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._places: dict[str, Reduced] = {}
        self._levels: dict[str, Level] = {}

    def add(self, place: str, level: Level, **reducers: Value) -> None:
        self._places[place] = Reduced(**reducers)
        self._levels[place] = level

    def level(self, place: str) -> Level:
        return self._levels[place]

    def __getitem__(self, place: str) -> Reduced:
        try:
            return self._places[place]
        except KeyError:
            known = ", ".join(repr(p) for p in list(self._places)[:8])
            raise KeyError(
                f"{self.name} has no place {place!r}; it has {known}{', ...' if len(self._places) > 8 else ''}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class MetricResult(Mapping[str, Quantity]):
    """All quantities of one metric over one window; also as attributes: ``result.update_norm``."""

    def __init__(self, metric: str, **details: Any) -> None:
        self.metric = metric
        self.details = details  #: facts that are not numbers over the window (what was tapped, notes)
        self._quantities: dict[str, Quantity] = {}

    def add(self, quantity: str, place: str, level: Level, **reducers: Value) -> None:
        self._quantities.setdefault(quantity, Quantity(quantity)).add(place, level, **reducers)

    def __getitem__(self, quantity: str) -> Quantity:
        return self._quantities[quantity]

    def __getattr__(self, quantity: str) -> Quantity:
        try:
            return self.__dict__["_quantities"][quantity]  # type: ignore[no-any-return]
        except KeyError:
            known = ", ".join(self.__dict__.get("_quantities", ())) or "none: nothing was observed"
            raise AttributeError(
                f"{self.__dict__.get('metric')} has no quantity {quantity!r}; it has {known}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._quantities)

    def __len__(self) -> int:
        return len(self._quantities)

    def flat(self, level: Level = "group") -> dict[str, float]:
        """{"metric/quantity.reducer/place": number} of one level and the totals, as experiment loggers want it."""
        if level not in _LEVELS:
            raise ValueError(f"level: expected one of {', '.join(_LEVELS)}, got {level!r}")
        return {
            f"{self.metric}/{name}.{reducer}/{place}": value.value
            for name, quantity in self._quantities.items()
            for place, reduced in quantity.items()
            if quantity.level(place) in (level, "total")
            for reducer, value in reduced.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Nested and JSON-ready: quantity, place, reducer."""
        numbers = {
            name: {place: {r: v.to_dict() for r, v in reduced.items()} for place, reduced in quantity.items()}
            for name, quantity in self._quantities.items()
        }
        return {"quantities": numbers, "details": json_ready(self.details)}


@dataclass(frozen=True)
class Window(Mapping[str, MetricResult]):
    """Results of all metrics over steps [first_step, last_step]; ``window["trajectory"]``."""

    index: int
    first_step: int  #: optimizer steps are counted from 1
    last_step: int
    closed: bool  #: False for the open window that compute() returns
    local: bool  #: True when other ranks hold parts that are not in these numbers
    results: dict[str, MetricResult] = field(repr=False)

    @property
    def steps(self) -> int:
        """Number of optimizer steps in the window."""
        return self.last_step - self.first_step + 1

    def __getitem__(self, metric: str) -> MetricResult:
        try:
            return self.results[metric]
        except KeyError:
            raise KeyError(f"no metric {metric!r} in this window; it has {', '.join(self.results) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def flat(self, level: Level = "group") -> dict[str, float]:
        """All metrics' numbers of one level and the totals: {"trajectory/update_norm.max/layers.0": 0.013, ...}."""
        out: dict[str, float] = {}
        for result in self.results.values():
            out |= result.flat(level)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Nested and JSON-ready."""
        header = {"index": self.index, "first_step": self.first_step, "last_step": self.last_step}
        return header | {
            "closed": self.closed,
            "local": self.local,
            "metrics": {name: result.to_dict() for name, result in self.results.items()},
        }


class History(deque[Window]):
    """The closed windows, oldest first; bounded by the Monitor's `history_limit`."""

    def series(self, metric: str, quantity: str, place: str, reducer: str) -> list[float]:
        """One number per closed window."""
        return [window[metric][quantity][place][reducer].value for window in self]

    def steadiness(self, place: str, metric: str = "lipschitz") -> list[float]:
        r"""Definition 1 of Loukas et al. per window: :math:`\varphi(\tau) = \max_{t \ge \tau} r_t`, tau = each window's
        start.

        A suffix maximum over the windows kept; the last entry is the last window's own maximum.
        """
        return suffix_maximum(self.series(metric, "normalized_gradient_norm", place, "max"))

    def to_dict(self) -> dict[str, Any]:
        """{"windows": [...]}, JSON-ready."""
        return {"windows": [window.to_dict() for window in self]}
