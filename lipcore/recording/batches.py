"""Which samples single steps were made of: the rows of the flight recorder, of the last steps and around alarms."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Steps that the flight recorder keeps, without those around an alarm.
KEPT = 512
#: Steps before and after an alarm that stay in the record: of the numbers of single parameters, which need steps to be
#: compared with, and of the samples.
AROUND, AROUND_SAMPLES = (128, 64), (32, 8)
_BYTES = 32 << 20  # of the samples of the last steps: fewer steps are kept of large batches

_TABLE = (
    "create table if not exists batches(step integer primary key, ids blob, norms blob, losses blob, rng blob,"
    " doubt text)"
)


@dataclass(frozen=True)
class Batch:
    """Samples of one step, of all its micro-batches.

    Attributes:
        step: its number.
        ids: int64 [B]; None where they were not given.
        norms: float32 [B], each sample's gradient norm; None where it was not measured.
        losses: float32 [B]; None where they were not given.
        rng_state: of a random generator, as the loop gave it.
        doubt: why the norms are not known, not proved to be single samples', or not of all parameters; "" if exact.
    """

    step: int
    ids: np.ndarray[Any, np.dtype[np.int64]] | None
    norms: np.ndarray[Any, np.dtype[np.float32]] | None
    losses: np.ndarray[Any, np.dtype[np.float32]] | None
    rng_state: bytes | None
    doubt: str = ""

    def row(self) -> tuple[int, bytes | None, bytes | None, bytes | None, bytes | None, str | None]:
        """Return it as a row of the table."""
        numbers = (None if a is None else np.ascontiguousarray(a, "<f4").tobytes() for a in (self.norms, self.losses))
        ids = None if self.ids is None else np.ascontiguousarray(self.ids, "<i8").tobytes()
        return self.step, ids, *numbers, self.rng_state, self.doubt or None  # type: ignore[return-value]


def make_table(connection: sqlite3.Connection) -> None:
    """Make the table where a file, as of an older version, has none, and a column that it lacks."""
    connection.execute(_TABLE)
    if not _has_doubts(connection):
        connection.execute("alter table batches add column doubt text")


def _has_doubts(connection: sqlite3.Connection) -> bool:
    return any(row[1] == "doubt" for row in connection.execute("pragma table_info(batches)"))


def add_batches(connection: sqlite3.Connection, batches: Iterable[Batch]) -> None:
    """Add steps, and forget those that are too old and near no alarm."""
    rows = [batch.row() for batch in batches]
    if not rows:
        return
    connection.executemany("insert or replace into batches values(?, ?, ?, ?, ?, ?)", rows)
    size = max(sum(len(blob) for blob in row[1:] if isinstance(blob, bytes)) for row in rows)
    kept = min(KEPT, max(1, _BYTES // max(size, 1)))
    before, after = AROUND_SAMPLES
    connection.execute(
        "delete from batches where step <= ? and not exists (select 1 from events where kind = 'alarm'"
        " and events.step between batches.step - ? and batches.step + ?)",
        (rows[-1][0] - kept, after, before),
    )


def forget_norms(connection: sqlite3.Connection, after: int) -> None:
    """Forget the norms of the samples of later steps: they were taken back."""
    connection.execute("update batches set norms = null, doubt = null where step > ?", (after,))


def forget_details(connection: sqlite3.Connection, quantity: str, newest: int) -> None:
    """Forget the steps of a quantity of single parameters that are too old and near no alarm."""
    before, after = AROUND
    connection.execute(
        "delete from steps where quantity = ? and last <= ? and not exists (select 1 from events"
        " where kind = 'alarm' and events.step between steps.first - ? and steps.last + ?)",
        (quantity, newest - KEPT, after, before),
    )


def read_batches(connection: sqlite3.Connection, first: int, last: int) -> Iterator[Batch]:
    """Yield the steps that are kept between two, in order; none from a file without the table."""
    if not connection.execute("select 1 from sqlite_master where name = 'batches'").fetchone():
        return
    doubt = "doubt" if _has_doubts(connection) else "null"
    rows = connection.execute(
        f"select step, ids, norms, losses, rng, {doubt} from batches where step between ? and ? order by step",
        (first, last),
    ).fetchall()
    for step, ids, norms, losses, rng, doubt in rows:
        yield Batch(step, _array(ids, "<i8"), _array(norms, "<f4"), _array(losses, "<f4"), rng, doubt or "")


def _array(blob: bytes | None, dtype: str) -> Any:
    return None if blob is None else np.frombuffer(blob, dtype)
