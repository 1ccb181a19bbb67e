"""Older steps of a record as minimum, mean and maximum, so that a file stays within its bytes."""

from __future__ import annotations

import sqlite3
from typing import Any

import numpy as np

from lipcore.recording.pack import Steps, unpacked_steps

#: Steps that become one.
FOLD = 64


def used_bytes(connection: sqlite3.Connection) -> int:
    """Return the bytes of a file's pages that hold something."""
    size, pages, free = (
        connection.execute(f"pragma {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
    )
    return int(size * (pages - free))


def fold_oldest(connection: sqlite3.Connection, places: dict[int, int]) -> bool:
    """Fold the older half of the blocks that hold single steps; return False where there is nothing to fold.

    Args:
        places: number of places by layout.
    """
    blocks = connection.execute(
        "select quantity, layout, first, last from steps where fold = 1 and last - first + 1 >= ? order by first",
        (FOLD,),
    ).fetchall()
    older = blocks[: len(blocks) // 2]
    where = " where quantity = ? and layout = ? and first = ? and last = ?"
    for block in older:
        # One at a time: together they are as large as the file.
        data = connection.execute("select data from steps" + where, block).fetchone()[0]
        few = folded(unpacked_steps(data, places[block[1]]))
        connection.execute("update steps set fold = ?, data = ?" + where, (FOLD, few, *block))
    return bool(older)


def folded(values: Steps) -> bytes:
    """Return numbers [steps, places] as a blob [3, places, steps / 64, rounded up]: minimum, mean and maximum, of the
    numbers that are finite; NaN where none is."""
    steps, places = values.shape
    padded = np.full((-(-steps // FOLD) * FOLD, places), np.nan, np.float32)
    padded[:steps] = np.where(np.isfinite(values), values, np.nan)
    groups = padded.reshape(-1, FOLD, places)
    found = [reduce(groups, axis=1) for reduce in (np.fmin.reduce, _mean, np.fmax.reduce)]
    return np.ascontiguousarray(np.stack(found).transpose(0, 2, 1), dtype="<f4").tobytes()


def unfolded(blob: bytes, places: int) -> np.ndarray[Any, Any]:
    """Return a folded blob's numbers [3, groups, places]."""
    return np.frombuffer(blob, dtype="<f4").reshape(3, places, -1).transpose(0, 2, 1)


def _mean(values: Any, axis: int) -> Any:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # of none; not np.nanmean, which warns in this thread
        return np.where(known, values, 0).sum(axis, dtype=np.float64) / known.sum(axis)
