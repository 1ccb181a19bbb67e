"""All that one metric says about one window."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from lipcore.metric.columns import Column, Columns, Places, one_if_same, rows_of, words_of
from lipcore.metric.later import Details, Later
from lipcore.metric.quantity import Quantity
from lipcore.metric.show import Showable, Shown, reducers_text
from lipcore.metric.values import LEVELS, Level, Value, json_ready
from lipcore.models.arguments import check_choice

_MAKING = threading.RLock()
_COLUMN = 256  # bytes of the objects around a column's arrays, about


class MetricResult(Showable, Mapping[str, Quantity]):
    """All quantities of one metric over one window; also as attributes: ``result.update_norm``."""

    def __init__(self, metric: str, **details: Any) -> None:
        self.metric = metric
        self.details = Details(details)  #: facts that are not numbers over the window (what was tapped, notes)
        self._made: dict[str, Quantity | Later[Quantity]] = {}
        self._unmade: list[tuple[Callable[[MetricResult], None], int]] = []
        self._pending: list[Later[Any]] = []  # what keeps things until it is made
        self._size: int | None = None

    def add(self, quantity: str, place: str, level: Level, **reducers: Value) -> None:
        """Add the values of a quantity in one place.

        Args:
            level: whether the place is a parameter ("tensor"), a group or layer of them ("group"), or all ("total").

        Raises:
            ValueError: another level.
        """
        check_choice("level", level, LEVELS)
        self._quantity(quantity).add(place, level, **reducers)

    def add_columns(self, quantity: str, columns: Columns) -> None:
        """Add a quantity's numbers in many places."""
        if len(columns.places):
            self._quantity(quantity).add_columns(columns)

    def add_later(
        self, quantity: str, place: str, level: Level, pending: Later[Any], reducers: Later[dict[str, Value]]
    ) -> None:
        """Add a quantity whose values are made when they are read, from something `pending`."""

        def made(values: dict[str, Value]) -> Quantity:
            found = Quantity(quantity)
            found.add(place, level, **values)
            return found

        self._all()[quantity] = reducers.then(made)
        self._pending.append(pending)

    def leave(self, add: Callable[[MetricResult], None], nbytes: int) -> None:
        """Leave quantities to the first reader: `add` adds them to the result that it is given, from what it keeps,
        of `nbytes`."""
        self._unmade.append((add, nbytes))

    def _all(self) -> dict[str, Quantity | Later[Quantity]]:
        """Return everything, that which was left to be made included."""
        if self._unmade:
            with _MAKING:  # another thread may be reading too
                for add, _ in self._unmade:
                    found = MetricResult(self.metric)
                    add(found)
                    self._made |= found._made
                self._unmade, self._size = [], None
        return self._made

    def _quantity(self, name: str) -> Quantity:
        self._size = None
        if name not in self._all():
            self._all()[name] = Quantity(name)
        return self[name]

    def __getitem__(self, quantity: str) -> Quantity:
        found = self._all()[quantity]
        if isinstance(found, Later):
            found = self._all()[quantity] = found.get()
            self._size = None
        return found

    def __getattr__(self, quantity: str) -> Quantity:
        found = self._all() if "_made" in self.__dict__ else {}
        if quantity in found:
            return self[quantity]
        known = ", ".join(found) or "none: nothing was observed"
        raise AttributeError(f"{self.__dict__.get('metric')} has no quantity {quantity!r}; it has {known}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._all()]

    def __contains__(self, quantity: object) -> bool:
        return quantity in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def flat(self, level: Level = "group") -> dict[str, float]:
        """Return {"metric/quantity.reducer/place": number} of one level and the totals, as experiment loggers want."""
        check_choice("level", level, LEVELS)
        return {
            f"{self.metric}/{name}.{reducer}/{place}": value.value
            for name, quantity in self.items()
            for place, reduced in quantity.items()
            if quantity.level(place) in (level, "total")
            for reducer, value in reduced.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it nested and JSON-ready: quantity, place, reducer; and the level of every place."""
        numbers = {
            name: {place: {r: v.to_dict() for r, v in reduced.items()} for place, reduced in quantity.items()}
            for name, quantity in self.items()
        }
        levels: dict[str, Level] = {}
        others: dict[str, dict[str, Level]] = {}
        for name, quantity in self.items():
            for place in quantity:
                level = quantity.level(place)
                if levels.setdefault(place, level) != level:
                    others.setdefault(name, {})[place] = level
        out = {"quantities": numbers, "details": json_ready(self.details), "levels": levels}
        return out | ({"other_levels": others} if others else {})

    @classmethod
    def from_dict(cls, metric: str, state: Mapping[str, Any]) -> MetricResult:
        """Restore what :meth:`to_dict` gave."""
        result = cls(metric)
        result.details.update(state["details"])
        others = state.get("other_levels", {})
        for name, by_place in state["quantities"].items():
            levels = state["levels"] | others.get(name, {})
            places = Places(by_place, [levels[place] for place in by_place])
            rows = [{r: Value.from_dict(value) for r, value in values.items()} for values in by_place.values()]
            result.add_columns(name, Columns(places, _columns_of(rows)))
        return result

    def withdraw(self, why: str, names: Collection[str] | None = None) -> None:
        """Make every number NaN, not valid, with the reason, or those of the quantities with these names: a later proof
        has shown that some samples were wrong."""
        for name, quantity in list(self._all().items()):
            if names is not None and name not in names:
                continue
            if isinstance(quantity, Later):
                self._all()[name] = quantity.then(lambda made: made.without(why))
            else:
                self._all()[name] = quantity.without(why)
        self.details["withdrawn"] = why
        self._size = None

    # ---- memory

    @property
    def nbytes(self) -> int:
        """Bytes of memory, about, with what is kept until numbers are made of it; places are shared by windows."""
        if self._size is None:
            found = [q for q in self._made.values() if isinstance(q, Quantity)]
            columns = [column for q in found for part in q.parts for column in part.reducers.values()]
            arrays = {id(array): array.nbytes for column in columns for array in column.arrays}
            self._size = sum(arrays.values()) + _COLUMN * len(columns)
        kept = sum(later.nbytes for later in self._pending) + sum(nbytes for _, nbytes in self._unmade)
        return self._size + kept

    @property
    def pending_bytes(self) -> int:
        """Bytes among them that go when the numbers made of them are read."""
        return sum(later.nbytes for later in self._pending)

    def drop_pending(self, why: str) -> None:
        """Give up what is kept for numbers that nobody has read; they are NaN from here on, with the reason."""
        for later in self._pending:
            later.drop(why)

    def __getstate__(self) -> dict[str, Any]:
        made = dict(self.items())
        return self.__dict__ | {"_made": made, "_unmade": [], "_pending": []}

    # ---- for people

    def _shown(self) -> Shown:
        return Shown(f"{self.metric}: {len(self)} quantities", self.shown_rows())

    def shown_rows(self) -> list[tuple[str, str, str]]:
        """Return rows of the totals, or of a quantity's first place where it has none. Makes nothing that is
        pending."""
        rows = []
        for name, quantity in self._all().items():
            if isinstance(quantity, Later):
                rows.append((name, "", "made when it is read"))
                continue
            totals = [place for place in quantity if quantity.level(place) == "total"] or list(quantity)[:1]
            rows += [(name if p == "total" else f"{name} {p}", *reducers_text(quantity[p])) for p in totals]
        for key in self.details:
            if key.endswith("_off"):
                rows.append((key.removesuffix("_off"), "off", str(self.details[key])))
            elif key.endswith("_skipped"):
                skipped: Mapping[str, int] = self.details[key]
                rows += [(key.removesuffix("_skipped"), f"{n} steps left out", why) for why, n in skipped.items()]
        return rows


def _columns_of(rows: list[dict[str, Value]]) -> dict[str, Column]:
    """Return the values of single places as columns."""
    columns = {}
    for reducer in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(reducer) for row in rows]
        there = [Value(0.0, 0) if value is None else value for value in values]
        errors = [value.error for value in there]
        columns[reducer] = Column(
            rows_of(np.array([[value.value for value in there]], dtype=np.float64))[0],
            one_if_same(np.array([value.count for value in there], dtype=np.int64)),
            words_of([value.label for value in there]),  # type: ignore[arg-type]
            one_if_same(np.array([value.valid for value in there])),
            words_of([value.note for value in there]),
            None if None in errors else rows_of(np.array([errors], dtype=np.float64))[0],
            None if None not in values else np.array([value is not None for value in values]),
        )
    return columns
