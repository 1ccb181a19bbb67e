"""The last steps of a record as a record of its own."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from lipcore.recording.batches import KEPT, make_table
from lipcore.recording.schema import connect

#: What is copied of each table, in which steps from the first one on.
_ROWS = {
    "meta": "key != 'schema'",
    "starts": "1",
    "layouts": "1",
    "steps": "last >= :first",
    "windows": "last >= :first",
    "events": "step >= :first",
    "batches": "step >= :first",
}


def write_excerpt(connection: sqlite3.Connection, target: Path, steps: int = KEPT) -> None:
    """Write the last so many steps of a record, in whole blocks, to another file, which is whole or not there at all.

    Raises:
        OSError, sqlite3.Error, RecordError: it cannot be written.
    """
    half = target.with_name(target.name + "-half")
    half.unlink(missing_ok=True)
    try:
        made = connect(half, write=True)
        make_table(made)
        made.execute("pragma journal_mode=delete")  # one file, which may be moved
        made.close()
        connection.execute("attach database ? as excerpt", (str(half),))
        try:
            _copy(connection, steps)
        finally:
            if connection.in_transaction:
                connection.rollback()
            connection.execute("detach database excerpt")
        replace_whole(half, target)
    finally:
        for left in (half, *(half.with_name(f"{half.name}-{kind}") for kind in ("journal", "wal", "shm"))):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def replace_whole(half: Path, target: Path) -> None:
    """Give a file that was written its name, on the disk as a whole: a machine that fails leaves no empty one."""
    with half.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(half, target)


def _copy(connection: sqlite3.Connection, steps: int) -> None:
    newest = (connection.execute(f"select max(last) from {table}").fetchone()[0] for table in ("steps", "windows"))
    first = max(int(last or 0) for last in newest) - steps + 1
    connection.execute("begin")
    for table, rows in _ROWS.items():
        connection.execute(f"insert into excerpt.{table} select * from main.{table} where {rows}", {"first": first})
    connection.execute("commit")
