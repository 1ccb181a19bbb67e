"""One quantity of a metric: its reducers in one place, and in all places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lipcore.metric.columns import Column, Columns, Numbers, Places
from lipcore.metric.values import Level, Value
from lipcore.models.names import listed


class Reduced(Mapping[str, Value]):
    """The reducers of one quantity in one place: ``update_norm["layers.0"].max``, or ``["max"]``."""

    def __init__(self, columns: Mapping[str, Column], i: int) -> None:
        self._columns, self._i = columns, i

    def __getitem__(self, reducer: str) -> Value:
        column = self._columns[reducer]
        if not column.has(self._i):
            raise KeyError(reducer)
        return column.value(self._i)

    def __getattr__(self, reducer: str) -> Value:
        if reducer in self.__dict__.get("_columns", ()) and self._columns[reducer].has(self._i):
            return self[reducer]
        known = ", ".join(self) if "_columns" in self.__dict__ else ""
        raise AttributeError(f"no reducer {reducer!r}; this quantity has {known}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __iter__(self) -> Iterator[str]:
        return (reducer for reducer, column in self._columns.items() if column.has(self._i))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Reduced({', '.join(f'{k}={v.value:.6g}' for k, v in self.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, ({reducer: Column.of(value) for reducer, value in self.items()}, 0)  # not all other places


class Quantity(Mapping[str, Reduced]):
    """One quantity of a metric in all its places: parameter names, group names, "total", or the output it refers to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._parts: list[Columns] = []
        self._index: dict[str, tuple[int, int]] | None = None  # part and row, of several parts

    def add(self, place: str, level: Level, **reducers: Value) -> None:
        """Add a single place, or say anew what its values are."""
        columns = {reducer: Column.of(value) for reducer, value in reducers.items()}
        self.add_columns(Columns(Places([place], [level]), columns))

    def add_columns(self, columns: Columns) -> None:
        """Add many places at once."""
        if len(columns.places):
            self._parts.append(columns)
            self._index = None

    def without(self, why: str) -> Quantity:
        """Return the same places with NaN for every number, and the reason."""
        found = Quantity(self.name)
        for part in self._parts:
            reducers = {
                name: Column(math.nan, column.counts, "heuristic", False, why, None, column.present)
                for name, column in part.reducers.items()
            }
            found.add_columns(Columns(part.places, reducers))
        return found

    @property
    def parts(self) -> list[Columns]:
        """The numbers as they are stored."""
        return list(self._parts)

    def array(self, reducer: str) -> Numbers:
        """Return one reducer's numbers, float64 [places] in the order of iteration; NaN where a place lacks it."""
        if not any(reducer in part.reducers for part in self._parts):
            known = ", ".join(dict.fromkeys(name for part in self._parts for name in part.reducers))
            raise KeyError(f"{self.name} has no reducer {reducer!r}; it has {known}")
        if len(self._parts) == 1:
            (part,) = self._parts
            where = list(part.places.index.values())
            return part.reducers[reducer].array(len(part.places))[where]
        found = (self[place].get(reducer) for place in self)
        return np.array([math.nan if value is None else value.value for value in found], dtype=np.float64)

    def level(self, place: str) -> Level:
        """Return whether a place is a tensor, a group or the total."""
        part, i = self._find(place)
        return part.places.levels[i]

    def _find(self, place: str) -> tuple[Columns, int]:
        if len(self._parts) == 1:
            return self._parts[0], self._parts[0].places.index[place]
        if self._index is None:
            self._index = {name: (p, i) for p, part in enumerate(self._parts) for name, i in part.places.index.items()}
        p, i = self._index[place]
        return self._parts[p], i

    def __getitem__(self, place: str) -> Reduced:
        try:
            part, i = self._find(place)
        except KeyError:
            raise KeyError(f"{self.name} has no place {place!r}; it has {listed(list(self))}") from None
        return Reduced(part.reducers, i)

    def __iter__(self) -> Iterator[str]:
        if len(self._parts) == 1:
            return iter(self._parts[0].places.index)
        return iter(dict.fromkeys(name for part in self._parts for name in part.places.index))

    def __len__(self) -> int:
        return len(self._parts[0].places.index) if len(self._parts) == 1 else sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Quantity({self.name!r}, {len(self)} place{'s' * (len(self) != 1)})"
