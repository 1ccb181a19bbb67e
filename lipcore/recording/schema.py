"""The file of a run record: an SQLite database, its tables, and what is checked when one is opened.

docs/record.md describes the tables for readers that have nothing but sqlite3.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

#: Of the tables below; a file with another number was written by another version.
VERSION = 1

_TABLES = """
create table meta(key text primary key, value text) without rowid;
create table starts(id integer primary key, kind text, step integer, wall real, config text);
create table layouts(id integer primary key, text text unique);
create table steps(
    quantity text, layout integer, first integer, last integer, fold integer, data blob,
    primary key(quantity, first, layout)
);
create table windows(
    last integer primary key, first integer, number integer, scope text, wall real, header blob, floats blob,
    counts blob
);
create table events(id integer primary key, step integer, wall real, kind text, text text, data text);
"""


class RecordError(RuntimeError):
    """The error of a run record that cannot be opened, read or written; the message names the file."""


def connect(path: Path, *, write: bool = False) -> sqlite3.Connection:
    """Open a record; with `write`, one that does not exist is made.

    Raises:
        RecordError: there is none, it is no record, or one of another version.
    """
    try:
        if write:
            found = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            found.execute("pragma journal_mode=wal")
            # A commit waits for no disk: after a crash of the machine, not of the process, the last may be missing.
            found.execute("pragma synchronous=normal")
        else:
            if not path.is_file():
                raise RecordError(f"{path}: there is no such record")
            found = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10)
        empty = not found.execute("select count(*) from sqlite_master").fetchone()[0]
        if empty and write:
            found.executescript(f"begin; {_TABLES} insert into meta values('schema', '{VERSION}'); commit;")
        version = _version(found)
    except sqlite3.Error as error:
        raise RecordError(f"{path}: cannot be opened as a run record of lipcore ({error})") from error
    if version != str(VERSION):
        found.close()
        what = "is no run record of lipcore" if version is None else f"is a record of schema {version}"
        raise RecordError(
            f"{path}: {what}, and this lipcore has schema {VERSION}; choose another file, or another lipcore"
        )
    return found


def _version(connection: sqlite3.Connection) -> str | None:
    try:
        row = connection.execute("select value from meta where key = 'schema'").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    return None if row is None else str(row[0])
