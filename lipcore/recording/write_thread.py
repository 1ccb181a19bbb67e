"""The thread that writes a record: what comes close together goes into one transaction."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

#: Seconds that something to write waits at most for more, which costs little in the same transaction.
TOGETHER = 0.1
_WAITING = 256  # things to write that wait at most; then the training waits
_AT_ONCE = 32  # of a transaction at most: it lies in the log until it is over


class _Work(NamedTuple):
    call: Callable[[], object]
    alone: bool
    always: bool


class WriteThread:
    """Thread that makes calls which write to a file, in their order.

    Every turn of the writing thread takes the interpreter away from the training, and every commit is a dozen of
    operations, whatever is written. So calls are collected for a tenth of a second, in which short steps come in
    several blocks, and made in one transaction.

    Args:
        connection: to the file.
        failed: told what a call has raised; none is made after that but those that are made always.
    """

    def __init__(self, connection: sqlite3.Connection, failed: Callable[[Exception], None]) -> None:
        self._connection, self._tell = connection, failed
        self._queue: queue.Queue[_Work | None] = queue.Queue(_WAITING)
        self._soon = threading.Event()  # nothing more is waited for
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="lipcore record", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object], *, soon: bool = False, alone: bool = False, always: bool = False) -> None:
        """Have a call made.

        Args:
            soon: at once.
            alone: outside any transaction.
            always: also where an earlier one has raised, and so outside any transaction too.
        """
        if self._queue.full():
            self._soon.set()
        self._queue.put(_Work(call, alone or always, always))
        if soon:
            self._soon.set()

    def end(self, timeout: float) -> None:
        """Make the calls that wait, and end; wait so many seconds for that at most."""
        self._queue.put(None)
        self._soon.set()
        self._thread.join(timeout)

    def _work(self) -> None:
        goes_on = True
        while goes_on:
            works = self._collected()
            goes_on = works[-1] is not None
            found = (work for work in works if work is not None)
            for alone, together in groupby(found, key=lambda work: work.alone):
                if alone:
                    for work in together:
                        self._make([work])
                else:
                    self._make(list(together), transaction=True)

    def _collected(self) -> list[_Work | None]:
        """Return what there is to do; the last is None where that is all."""
        works = [self._queue.get()]
        if works[0] is not None:
            self._soon.wait(TOGETHER)
            self._soon.clear()
        while works[-1] is not None and not self._queue.empty():  # nobody else takes anything
            if len(works) == _AT_ONCE:
                self._soon.set()
                break
            works.append(self._queue.get())
        return works

    def _make(self, works: list[_Work], *, transaction: bool = False) -> None:
        if self._failed:
            works = [work for work in works if work.always]
        try:
            if transaction and works:
                self._connection.execute("begin immediate")
            for work in works:
                work.call()
            if transaction and works:
                self._connection.execute("commit")
        except Exception as error:
            self._failed = True
            self._tell(error)
            if self._connection.in_transaction:
                self._connection.rollback()
