"""Numbers of many places as arrays, with what each is worth beside them; one scalar where all places agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lipcore.metric.values import Label, Level, Value

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
#: Positions of some places.
Where = slice | Counts


class Places:
    """Names of places (parameters, groups, "total") and the level of each; windows of one metric share them.

    A name that stands there twice is the later place.
    """

    def __init__(self, names: Iterable[str], levels: Iterable[Level]) -> None:
        self.names, self.levels = tuple(names), tuple(levels)

    @cached_property
    def index(self) -> dict[str, int]:
        """Positions of the numbers by name."""
        return {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def at(self, where: Sequence[int]) -> Places:
        """Return some of them."""
        return Places([self.names[i] for i in where], [self.levels[i] for i in where])

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, (self.names, self.levels)


class Words:
    """A word per place, of which few are different."""

    __slots__ = ("codes", "words")

    def __init__(self, codes: np.ndarray[Any, Any], words: tuple[str, ...]) -> None:
        self.codes, self.words = codes, words

    @classmethod
    def of(cls, codes: np.ndarray[Any, Any], words: tuple[str, ...]) -> str | Words:
        """Return the words with these numbers; one where all are the same."""
        if (codes == codes[0]).all():
            return words[int(codes[0])]
        return cls(codes.astype(np.uint8 if len(words) <= 256 else np.int32), words)

    def __getitem__(self, i: int) -> str:
        return self.words[int(self.codes[i])]

    def tolist(self) -> list[str]:
        """Return the word of every place."""
        return [self.words[code] for code in self.codes.tolist()]


def words_of(words: Sequence[str]) -> str | Words:
    """Return words, one per place, in little memory.

    >>> words_of(["exact", "exact"])
    'exact'
    >>> words_of(["a", "b", "a"]).codes.tolist()
    [0, 1, 0]
    """
    known = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return Words.of(np.array([known[word] for word in words]), tuple(known))


def one_if_same(values: np.ndarray[Any, Any]) -> Any:
    """Return the one item of an array of equal ones; else the array itself.

    >>> one_if_same(np.array([3, 3]))
    3
    """
    return values[0].item() if (values == values[0]).all() else values


def rows_of(numbers: Numbers) -> list[float | Numbers]:
    """Return the rows of a matrix [rows, places], and the one number of those that are the same bits everywhere."""
    numbers = np.ascontiguousarray(numbers)
    bits = numbers.view(np.int64)
    same = (bits == bits[:, :1]).all(axis=1)
    first, kept = numbers[:, 0].tolist(), iter(numbers[~same])
    return [first[i] if constant else next(kept) for i, constant in enumerate(same.tolist())]


class CompactRows:
    """The rows of a matrix [rows, places], in little memory: of a row that is the same bits everywhere, one number.

    >>> rows = CompactRows(np.array([[1.0, 1.0], [2.0, 3.0]]))
    >>> rows[0].tolist(), rows[1].tolist()
    ([1.0, 1.0], [2.0, 3.0])
    """

    __slots__ = ("_places", "_rows")

    def __init__(self, numbers: Numbers) -> None:
        self._rows, self._places = rows_of(numbers), numbers.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(8 if isinstance(row, float) else row.nbytes for row in self._rows)

    def __getitem__(self, i: int) -> Numbers:
        row = self._rows[i]
        return np.full(self._places, row) if isinstance(row, float) else row


@dataclass(frozen=True, slots=True)
class Column:
    """One reducer of a quantity in all places. Each field is one thing for all of them, or has an item per place."""

    numbers: float | Numbers
    counts: int | Counts
    labels: Label | Words = "exact"
    valid: bool | Flags = True
    notes: str | Words = ""
    errors: float | Numbers | None = None
    present: Flags | None = None  #: places that have this reducer; None: all

    @classmethod
    def of(cls, value: Value) -> Column:
        """Return the column of a single place."""
        return cls(value.value, value.count, value.label, value.valid, value.note, value.error)

    def has(self, i: int) -> bool:
        """Say whether place i has this reducer."""
        return self.present is None or bool(self.present[i])

    def value(self, i: int) -> Value:
        """Return the value of place i."""
        error = self.errors
        return Value(
            _number(self.numbers, i),
            int(self.counts if isinstance(self.counts, int) else self.counts[i]),
            self.labels if isinstance(self.labels, str) else self.labels[i],  # type: ignore[arg-type]
            bool(self.valid if isinstance(self.valid, bool) else self.valid[i]),
            self.notes if isinstance(self.notes, str) else self.notes[i],
            None if error is None else _number(error, i),
        )

    def at(self, where: Where) -> Column:
        """Return the column of some of the places."""
        present = None if self.present is None or self.present[where].all() else self.present[where]
        return Column(
            _some(self.numbers, where), _some(self.counts, where), _some(self.labels, where), _some(self.valid, where),
            _some(self.notes, where), _some(self.errors, where), present,
        )  # fmt: skip

    def array(self, places: int) -> Numbers:
        """Return float64 [places]; NaN where there is no such reducer."""
        numbers = np.broadcast_to(np.asarray(self.numbers, dtype=np.float64), (places,))
        return numbers if self.present is None else np.where(self.present, numbers, math.nan)

    @property
    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """Arrays of the column, that is all of it that takes memory; columns share arrays."""
        fields = (self.numbers, self.counts, self.valid, self.errors, self.present)
        words = (field.codes for field in (self.labels, self.notes) if isinstance(field, Words))
        return [*(field for field in fields if isinstance(field, np.ndarray)), *words]


def _some(items: Any, where: Where) -> Any:
    if isinstance(items, np.ndarray):
        return items[where]
    return Words.of(items.codes[where], items.words) if isinstance(items, Words) else items


def _number(numbers: float | Numbers, i: int) -> float:
    number = float(numbers[i]) if isinstance(numbers, np.ndarray) else numbers
    # One NaN for all, so that two readings of a Value are equal.
    return math.nan if number != number else number


@dataclass(frozen=True, slots=True)
class Columns:
    """Reducers of one quantity in the same places."""

    places: Places
    reducers: Mapping[str, Column]

    def where_present(self) -> Columns:
        """Return the same without places that have none of the reducers."""
        masks = [column.present for column in self.reducers.values()]
        if any(mask is None for mask in masks):
            return self
        there = np.flatnonzero(np.logical_or.reduce(masks))  # type: ignore[arg-type]
        if len(there) == len(self.places):
            return self
        return Columns(self.places.at(there.tolist()), {name: c.at(there) for name, c in self.reducers.items()})
