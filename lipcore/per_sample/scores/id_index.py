"""Consecutive numbers for arbitrary 64-bit ids, a whole array at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]

_DENSE = 1 << 24  # ids from 0 to here are looked up in a table (of untouched zero pages where there are gaps)


class IdIndex:
    """Slot of every id, 0, 1, 2, ... in the order in which ids were added."""

    def __init__(self) -> None:
        self.ids = np.empty(0, np.int64)  #: by slot; may be longer than the index
        self._count = 0
        self._table = np.zeros(0, np.int64)  # slot + 1 of small ids
        # Open addressing with linear probing, at most half full, for all other ids.
        self._hashed = np.zeros(64, np.int64)  # slot + 1
        self._hashed_count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, ids: Ids) -> Ids:
        """Return the slots [n] of ids [n]; -1 for an unknown id."""
        small = (ids >= 0) & (ids < len(self._table))
        slots = np.zeros(len(ids), np.int64)
        slots[small] = self._table[ids[small]]
        if self._hashed_count:
            large = np.flatnonzero((ids < 0) | (ids >= _DENSE))
            slots[large] = self._hashed[self._cells(ids[large])]
        return slots - 1

    def add(self, ids: Ids) -> Ids:
        """Return the slots of ids that are all different; unknown ones get the next slots."""
        slots = self.find(ids)
        new = np.flatnonzero(slots < 0)
        if not len(new):
            return slots
        added = ids[new]
        slots[new] = np.arange(self._count, self._count + len(new))
        self.ids = grown(self.ids, self._count + len(new))
        self.ids[self._count : self._count + len(new)] = added
        self._count += len(new)
        small = (added >= 0) & (added < _DENSE)
        if small.any():
            self._table = grown(self._table, int(added[small].max()) + 1)
            self._table[added[small]] = slots[new][small] + 1
        self._add_hashed(slots[new][~small])
        return slots

    def keep(self, count: int) -> None:
        """Forget all ids but the first so many."""
        kept = self.ids[:count].copy()
        self.__init__()  # type: ignore[misc]
        self.add(kept)

    def _add_hashed(self, slots: Ids) -> None:
        count = self._hashed_count + len(slots)
        if 2 * count > len(self._hashed):
            slots = np.concatenate([self._hashed[self._hashed > 0] - 1, slots])
            self._hashed = np.zeros(1 << (4 * count - 1).bit_length(), np.int64)
        self._hashed_count = count
        while len(slots):
            cells = self._cells(self.ids[slots])  # free ones
            self._hashed[cells] = slots + 1
            slots = slots[self._hashed[cells] != slots + 1]  # another one took the cell

    def _cells(self, ids: Ids) -> Ids:
        """Return the cell of the hash table in which each id is, or the free one where the search for it ends."""
        last = len(self._hashed) - 1
        cells = (_mixed(ids) & np.uint64(last)).astype(np.int64)
        open_ = np.arange(len(ids))
        while len(open_):
            found = self._hashed[cells[open_]]
            open_ = open_[(found > 0) & (self.ids[found - 1] != ids[open_])]
            cells[open_] = (cells[open_] + 1) & last
        return cells


def grown(array: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """Return the array, or a longer one of zeros that starts with it: twice as long each time, so that growing is
    cheap."""
    if length <= len(array):
        return array
    out = np.zeros((max(length, 2 * len(array)), *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


def _mixed(ids: Ids) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Mix the bits of ids by Stafford's variant 13 of the 64-bit finaliser (as in splitmix64): strides and high bits
    spread over all bits."""
    x = ids.view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
