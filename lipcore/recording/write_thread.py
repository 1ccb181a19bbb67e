"""The thread that writes a record: what comes close together goes into one transaction."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

#: Seconds that something to write waits at most for more, which costs little in the same transaction.
TOGETHER = 0.1
_WAITING = 256  # things to write that wait at most; then the training waits
_PATIENCE = 60.0  # seconds that it waits at most, for a file system that hangs
_AT_ONCE = 32  # of a transaction at most: it lies in the log until it is over


class _Work(NamedTuple):
    call: Callable[[], object]
    alone: bool
    always: bool
    must: bool
    mends: bool


class WriteThread:
    """Thread that makes calls which write to a file, in their order.

    Every turn of the writing thread takes the interpreter away from the training, and every commit is a dozen of
    operations, whatever is written. So calls are collected for a tenth of a second, in which short steps come in
    several blocks, and made in one transaction.

    Args:
        connection: to the file.
        failed: told what a call has raised; none is made after that but those that are made always, until one that
            mends it has been.
    """

    def __init__(self, connection: sqlite3.Connection, failed: Callable[[Exception], None]) -> None:
        self._connection, self._tell = connection, failed
        self._queue: queue.Queue[_Work | None] = queue.Queue(_WAITING)
        self._soon = threading.Event()  # nothing more is waited for
        self._failed = False
        self._missed: list[_Work] = []  # since then, of those that must be made
        self._hangs = False  # something was left out, for which there was no room, and since then there was none
        self._thread = threading.Thread(target=self._work, name="lipcore record", daemon=True)
        self._thread.start()

    def put(
        self,
        call: Callable[[], object],
        *,
        soon: bool = False,
        alone: bool = False,
        always: bool = False,
        must: bool = False,
        mends: bool = False,
    ) -> None:
        """Have a call made. Where too many wait, and none is made for a minute, it is left out, and told of as one that
        has raised; so are further ones, without a wait, until there is room again.

        Args:
            soon: at once.
            alone: outside any transaction.
            always: also where an earlier one has raised, and so outside any transaction too.
            must: it is not left out where an earlier one has raised, but made before calls are made again; nor where
                there is no room, for which it waits.
            mends: after it, and those that must be made, calls are made again, where none of them raises.
        """
        if self._queue.full():
            self._soon.set()
        try:
            patience = None if must else 0 if self._hangs else _PATIENCE
            self._queue.put(_Work(call, alone or always or mends, always, must, mends), patience != 0, patience)
        except queue.Full:
            if not self._hangs:
                self._hangs = True
                self._tell(TimeoutError(f"nothing was written in {_PATIENCE:g} seconds, while {_WAITING} blocks wait"))
            return
        self._hangs = False
        if soon:
            self._soon.set()

    def end(self, timeout: float) -> bool:
        """Make the calls that wait, and end; wait so many seconds for that at most, and return whether it was over."""
        self._soon.set()
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
            self._soon.set()
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        goes_on = True
        while goes_on:
            works = self._collected()
            goes_on = works[-1] is not None
            found = (work for work in works if work is not None)
            for alone, together in groupby(found, key=lambda work: work.alone):
                if alone:
                    for work in together:
                        self._mend(work) if work.mends else self._make([work])
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

    def _mend(self, work: _Work) -> None:
        """Try to write again: a full disk may have room now."""
        missed, self._missed, self._failed = self._missed, [], False
        for each in (*missed, work):
            self._make([each], transaction=not each.alone)

    def _make(self, works: list[_Work], *, transaction: bool = False) -> None:
        if self._failed:
            self._missed += [work for work in works if work.must]
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
            self._missed += [work for work in works if work.must]
            with contextlib.suppress(sqlite3.Error):  # else this thread would end, and the training wait for it
                if self._connection.in_transaction:
                    self._connection.rollback()
            self._tell(error)
