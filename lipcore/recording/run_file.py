"""The file of a run record, opened for reading: its rows, the places of its layouts, and errors that name it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lipcore.metric.columns import Places
from lipcore.recording.location import SUFFIX
from lipcore.recording.pack import places_of
from lipcore.recording.schema import RecordError, connect

#: Later than any step.
ANY = 1 << 62


class RunFile:
    """File of a run record that is read, also while the training writes it.

    Args:
        path: of one rank's file.

    Raises:
        RecordError: there is none, or it is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._connection = path, connect(path)
        self._layouts: dict[int, Places] = {}

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """Return what a query finds."""
        with self.named() as connection:
            return connection.execute(sql, values).fetchall()

    def texts(self) -> dict[int, str]:
        """Return the texts of all layouts, by number."""
        return dict(self.rows("select id, text from layouts"))

    def places(self, layout: int) -> Places:
        """Return the places of a layout."""
        if layout not in self._layouts:
            self._layouts |= {number: places_of(text) for number, text in self.texts().items()}
        return self._layouts[layout]

    @contextmanager
    def named(self) -> Iterator[sqlite3.Connection]:
        """Read by the connection itself, in a with block whose errors name the file."""
        try:
            yield self._connection
        except sqlite3.Error as error:
            raise RecordError(f"{self._path}: cannot be read ({error})") from error

    @contextmanager
    def as_of_now(self) -> Iterator[None]:
        """Read the file as it is now, whatever is written meanwhile, in a with block."""
        with self.named() as connection:
            connection.execute("begin")
        try:
            yield
        finally:
            self._connection.execute("rollback")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def file_of(path: Path, rank: int) -> Path:
    """Return the file of a rank in a run's folder; of a path that is no folder, itself.

    Raises:
        RecordError: there is no run.
        ValueError: the run has no file of this rank.
    """
    if not path.is_dir():
        if not path.exists():
            raise RecordError(f"path: there is no run {path}")
        return path
    found = sorted(path.glob(f"rank*{SUFFIX}"))
    wanted = path / f"rank{rank}{SUFFIX}"
    if wanted in found:
        return wanted
    if found:
        raise ValueError(f"rank: the run has no record of rank {rank}; it has {', '.join(each.name for each in found)}")
    runs = sorted({each.parent.name for each in path.glob(f"*/rank*{SUFFIX}")})
    if runs:
        raise RecordError(f"path: {path} holds several runs, {', '.join(runs)}; open one of them")
    raise RecordError(f"path: there is no record in {path}")
