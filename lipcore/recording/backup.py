"""Copies of a record that is being written: an older run's, and that of a network's file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from lipcore.recording.location import local_copy


def backup(connection: sqlite3.Connection, target: Path) -> None:
    """Copy a record as it is now to another file, which is whole at every moment.

    Raises:
        OSError, sqlite3.Error: it cannot be written.
    """
    with _whole(target) as half:
        copy = sqlite3.connect(half, isolation_level=None)
        try:
            connection.backup(copy)
            copy.execute("pragma journal_mode=delete")  # one file, which can be read where nothing may be written
        finally:
            copy.close()


class NetworkCopy:
    """The file of a record on this machine's own disk, and what is copied of it to a network's file system, whose locks
    SQLite cannot trust: there it opens nothing.

    Args:
        path: of the record there. What it has already is copied here.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = local_copy(path)
        self.behind = ""  #: why what lies on the network is older than this file
        try:
            if path.exists():
                shutil.copyfile(path, self.file)
        except OSError:
            self._remove()
            raise

    def copy(self, connection: sqlite3.Connection, target: Path) -> None:
        """Copy the file as it is now to another one on the network.

        Raises:
            OSError, sqlite3.Error: it cannot be written.
        """
        here = self.file.with_name(f"{self.file.name}-copy")
        try:
            backup(connection, here)
            with _whole(target) as half:
                shutil.copyfile(here, half)
        finally:
            here.unlink(missing_ok=True)

    def publish(self, connection: sqlite3.Connection) -> None:
        """Copy the file to the network. Where that fails, the next time makes up for it, and :attr:`behind` says so."""
        try:
            self.copy(connection, self._path)
            self.behind = ""
        except (OSError, sqlite3.Error) as error:
            self.behind = (
                f"{self._path} is older than the record, which could not be copied there ({type(error).__name__}: "
                f"{error}), and lies in {self.file}"
            )

    def close(self) -> None:
        """Remove the file, where the network has all of it."""
        if not self.behind:
            self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
            self.file.parent.rmdir()


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Yield a file to be written, which takes the target's place when that is over, or is removed where it raised."""
    half = target.with_name(target.name + "-half")
    half.unlink(missing_ok=True)
    try:
        yield half
        os.replace(half, target)
    except BaseException:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        raise
