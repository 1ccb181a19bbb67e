"""Records of ranks that a run no longer has, where it goes on with fewer of them, or begins anew: the first rank takes
back what it takes back of its own."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from lipcore.metric.values import LEVELS
from lipcore.recording.backup import NetworkCopy, backup
from lipcore.recording.batches import make_table
from lipcore.recording.location import SUFFIX, Hold, being_written, of_a_network
from lipcore.recording.record_tables import RecordTables
from lipcore.recording.schema import RecordError, connect

_NAME = re.compile(rf"rank(\d+){re.escape(SUFFIX)}")


def take_back_ranks_left(folder: Path, ranks: int, step: int) -> list[str]:
    """Remove what the records of ranks from number `ranks` on have of later steps than this, which are made again
    without them; at step 0 put their files aside. Return what was done, or why it could not be, a sentence per file.

    One rank calls it. A file that another process writes is left alone.
    """
    said = []
    for path in sorted(folder.glob(f"rank*{SUFFIX}")):
        name = _NAME.fullmatch(path.name)
        if name is None or int(name[1]) < ranks:
            continue
        try:
            said += _take_back(path, ranks, step)
        except (RecordError, OSError, sqlite3.Error) as error:
            said.append(f"{path.name} may have steps of a history that was taken back; it was left as it is ({error})")
    return said


def _take_back(path: Path, ranks: int, step: int) -> list[str]:
    with _opened(path) as tables:
        if step == 0:
            older = tables.set_aside()
        elif not tables.has_later(step):
            return []
        else:
            text = f"the run goes on with {ranks} rank{'s' * (ranks > 1)} behind step {step}, without this one"
            tables.take_back(step, time.time(), "rank left", text)
            return [f"what {path.name} had of steps behind {step} was removed"]
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return [f"{path.name} is {older} now"]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[RecordTables]:
    """Yield the tables of a record that nobody else writes meanwhile; on a network's file system those of a copy, which
    takes its place afterwards."""
    if being_written(path):
        raise RecordError("another process writes it")
    hold = Hold(path)
    network: NetworkCopy | None = None
    try:
        network = NetworkCopy(path) if of_a_network(path.parent) else None
        connection = connect(path if network is None else network.file, write=True)
        try:
            make_table(connection)
            copy = backup if network is None else network.copy
            yield RecordTables(connection, path, copy, LEVELS, 1 << 62)
            if network is not None:
                network.publish(connection)
                if network.behind:
                    raise RecordError(network.behind)
        finally:
            with contextlib.suppress(sqlite3.Error):  # while somebody reads, say
                connection.execute("pragma journal_mode = delete")
            connection.close()
    finally:
        hold.close()
        if network is not None:
            network.close()
