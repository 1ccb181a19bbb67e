"""What ranks do not have alike, in one checkpoint: an axis of ranks whose length does not depend on their number.

torch.distributed.checkpoint asks at a load for keys that have to be there, before anything is read, and of several
entries under one key it keeps any. So each rank writes under keys of its own, and all keys are there whatever the
number of ranks: rank r of n writes entry r, and empty entries r + n, r + 2n, ... At a load rank r of m asks for r, r +
m, r + 2m, ...: together the ranks read each entry once, with as many ranks as then each its own. No rank waits for
another, and neither memory nor bytes grow with the number of ranks. An entry is bytes, which have no fixed size.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_LENGTH = 256  # of the axis, up to as many ranks; then the next power of two
_EMPTY = b"-"  # torch.load(weights_only=True) reads no b""


@dataclass(frozen=True)
class Place:
    """One rank among those that train a model.

    Attributes:
        rank: its place among them, from 0.
        ranks: how many they are.
        numbers: what torch.distributed calls them.
        apart: each of them trains a model of its own.
    """

    rank: int
    ranks: int
    numbers: tuple[int, ...] = (0,)
    apart: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}"

    @property
    def key(self) -> str:
        """Key of what all ranks have alike; where these are apart, of what this one has."""
        return f"rank {self.rank}" if self.apart else "all"


def packed(entry: Any) -> bytes:
    """Return tensors, numbers and strings in dicts and lists as bytes."""
    file = io.BytesIO()
    torch.save(entry, file)
    return file.getvalue()


def unpacked(path: str, entry: Any) -> Any:
    """Return what :func:`packed` was given; ValueError naming the path of what is no such bytes."""
    if not isinstance(entry, bytes):
        raise ValueError(f"{path}: expected bytes, got {type(entry).__name__}")
    try:
        return torch.load(io.BytesIO(entry), weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {str(error)[:80]})") from None


def spread(entry: Any, place: Place) -> dict[str, bytes]:
    """Return the entries that this rank writes, and reads, by key."""
    mine = packed(entry)
    return {str(slot): mine if slot == place.rank else _EMPTY for slot in _slots(place)}


def read_back(path: str, entries: Any) -> dict[int, Any]:
    """Return what is in the entries that are not empty, by the rank that wrote it; ValueError naming the first that is
    none."""
    if not isinstance(entries, Mapping) or not all(str(key).isdigit() for key in entries):
        raise ValueError(f"{path}: expected entries by rank, got {_what(entries)}")
    found = sorted((int(key), entry) for key, entry in entries.items())
    return {rank: unpacked(f"{path}.{rank}", entry) for rank, entry in found if entry != _EMPTY}


def taken_over(place: Place, ranks: int) -> list[int]:
    """Return from which ranks of so many this one goes on: none of them from two."""
    return [place.rank] if place.apart else list(range(place.rank, ranks, place.ranks))


def _slots(place: Place) -> range:
    length = max(_LENGTH, 1 << (place.ranks - 1).bit_length())
    return range(place.rank, place.rank + 1) if place.apart else range(place.rank, length, place.ranks)


def _what(value: Any) -> str:
    return f"keys {sorted(map(str, value))[:4]}" if isinstance(value, Mapping) else type(value).__name__
