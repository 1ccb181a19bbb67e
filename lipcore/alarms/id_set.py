"""Sets of sample ids that take a byte or little more for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_TABLE = 1 << 27  # ids from here on, and negative ones, are no positions in a dataset


class IdSet:
    """Set of sample ids: a table of bytes for positions in a dataset, Python's set for all others."""

    def __init__(self) -> None:
        self._table: NDArray[Any] = np.zeros(0, bool)
        self._others: set[int] = set()

    def add(self, ids: Ids) -> Ids:
        """Add ids; return those that were there already or come more than once, in ascending order."""
        each, counts = np.unique(ids, return_counts=True)
        small = (each >= 0) & (each < _TABLE)
        positions, others = each[small], each[~small]
        if len(positions) and positions[-1] >= len(self._table):
            grown = np.zeros(max(int(positions[-1]) + 1, min(2 * len(self._table), _TABLE)), bool)
            grown[: len(self._table)] = self._table
            self._table = grown
        there = np.zeros(len(each), bool)
        there[small] = self._table[positions]
        there[~small] = [one in self._others for one in others.tolist()]
        self._table[positions] = True
        self._others.update(others.tolist())
        return each[there | (counts > 1)]

    def without(self, other: IdSet) -> Ids:
        """Return the ids that are not in the other set, in ascending order."""
        theirs = np.zeros(len(self._table), bool)
        theirs[: len(other._table)] = other._table[: len(self._table)]
        rest = np.array(sorted(self._others - other._others), np.int64)
        return np.sort(np.concatenate([np.flatnonzero(self._table & ~theirs), rest]))

    def join(self, other: IdSet) -> None:
        """Take in all ids of the other set."""
        table = np.zeros(max(len(self._table), len(other._table)), bool)
        for each in (self._table, other._table):
            table[: len(each)] |= each
        self._table = table
        self._others |= other._others
