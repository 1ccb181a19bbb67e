"""The writer of a run record: one file per writing process, written by a thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lipcore.metric.results import Window
from lipcore.metric.values import LEVELS, Level
from lipcore.models.arguments import check_choice, check_count
from lipcore.recording.backup import NetworkCopy, backup
from lipcore.recording.batches import KEPT, Batch, add_batches, forget_norms, make_table
from lipcore.recording.excerpt import write_excerpt
from lipcore.recording.location import Hold, of_a_network, record_path
from lipcore.recording.pack import kept_places
from lipcore.recording.ranks_left import take_back_ranks_left
from lipcore.recording.record_tables import RecordTables
from lipcore.recording.schema import RecordError, connect
from lipcore.recording.step_time import add_step_time
from lipcore.recording.write_thread import WriteThread
from lipcore.report.source import StepTime

RecordLevel = Literal["group", "tensor"]
MAX_BYTES = 2 << 30
_DETAIL_SHARE = 8  # of `max_bytes`, the part that the last steps of single parameters may take
_AGAIN = 60.0  # seconds after a failure until writing is tried again
_AT_THE_END = 60.0  # seconds that close() waits for the thread


class RunRecord:
    """A record of one process's part of a run, in ``<run>/rank<rank>.lipcore``.

    What is written goes to a thread of its own; :meth:`flush` waits until it is in the file. Where writing fails (a
    full disk), :attr:`failed` says why, and nothing is raised; a minute later it is tried again, and where it works the
    record goes on, with an event "gap".

    Args:
        run: folder of the run, which is made where it does not exist.
        rank: the number of the process.
        ranks: how many processes write records of this run; the first, where it begins or goes on, takes back what
            records of others in the folder have, from a run of more. None: not known, they are left alone.
        level: the finest places that are written: "group", or "tensor" for every parameter.
        max_bytes: where the file grows beyond, older steps are folded to minimum, mean and maximum of 64.
        model: what tells one model from another; a record of another one is refused.
        config: facts about the run, as JSON has them.

    Raises:
        TypeError, ValueError: an argument is no such thing.
        RecordError: the file cannot be written, is no record, is another model's, or another process writes it.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        rank: int = 0,
        ranks: int | None = None,
        level: RecordLevel = "group",
        max_bytes: int = MAX_BYTES,
        model: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_choice("record_level", level, get_args(RecordLevel))
        check_count("max_bytes", max_bytes, 1 << 20)
        self.config = checked_config(config)
        self.levels: tuple[Level, ...] = LEVELS if level == "tensor" else ("group", "total")
        self.path = record_path(run, rank)
        self._limit, self._ranks = max_bytes, ranks if rank == 0 else None
        self.left: tuple[str, ...] = ()  #: what became of records of ranks that the run no longer has
        self._hold = Hold(self.path)
        self._network: NetworkCopy | None = None
        self.failed, self._again = "", 0.0  #: why nothing is written, and when that is tried again
        try:
            self._open(model)
        except Exception:
            self._hold.close()
            if self._network is not None:
                self._network.close()
            raise
        self._closed = False
        self._process = os.getpid()
        self._thread = WriteThread(self._connection, self._has_failed)
        atexit.register(self.close)  # a loop that raises ends no Monitor

    def _open(self, model: str) -> None:
        try:
            if of_a_network(self.path.parent):
                self._network = NetworkCopy(self.path)
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be read ({error}); choose another folder") from error
        self._connection = connect(self.path if self._network is None else self._network.file, write=True)
        try:
            self._check_model(model)
            make_table(self._connection)
            copy = backup if self._network is None else self._network.copy
            self._tables = RecordTables(self._connection, self.path, copy, self.levels, self._limit)
            self._known = {row[0] for row in self._connection.execute("select distinct quantity from steps")}
        except Exception:
            self._connection.close()
            raise

    @property
    def older(self) -> str:
        """Name that an older run's file was given; "" where there was none."""
        return self._tables.older

    @property
    def behind(self) -> str:
        """Reason why the file of a network's file system is older than the record; "" where it is not."""
        return "" if self._network is None else self._network.behind

    def _check_model(self, model: str) -> None:
        row = self._connection.execute("select value from meta where key = 'model'").fetchone()
        if row is None:
            self._connection.execute("insert into meta values('model', ?)", (model,))
        elif row[0] != model:
            raise RecordError(
                f"run: {self.path} is the record of another model (its parameters have other names or shapes); choose "
                "another folder"
            )

    # ---- what is written; each returns at once

    def begin(self, step: int, facts: Mapping[str, Any] | None = None) -> None:
        """Begin, or go on, behind this step: what the record has of later ones is removed, since they are made again.

        A run that begins anew, at step 0, where the file has an older one, gets a file of its own; the older one is
        kept beside it. `facts` of this beginning come to those of the run."""
        wall, known = time.time(), {**self.config, **(facts or {})}
        self._put(lambda: self._begin(step, wall, known), alone=True, must=True)

    def add_steps(
        self,
        first: int,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        names: Sequence[str],
        levels: Sequence[Level],
        *,
        measured: bool = False,
    ) -> None:
        """Add numbers of single steps by "metric/quantity", [steps, places], the first of them of step `first`. They
        must not change later. `measured`: NaN alone is a finding too, not a quantity that nobody measures."""
        where, text = kept_places(tuple(names), tuple(levels), self.levels)
        if not text:
            return
        found = {
            quantity: array if where is None else array[:, where]
            for quantity, array in arrays.items()
            if array.size and (measured or quantity in self._known or not np.isnan(array).all())
        }
        self._put_steps(first, found, text)

    def add_details(
        self, first: int, arrays: Mapping[str, np.ndarray[Any, Any]], names: Sequence[str], levels: Sequence[Level]
    ) -> None:
        """Add numbers of single parameters, [steps, places] by quantity, of which the last 512 steps and those around
        an alarm are kept; nothing where the record has every parameter anyway, or where they would be too large."""
        where, text = kept_places(tuple(names), tuple(levels), ("tensor",))
        size = 4 * KEPT * levels.count("tensor") * len(arrays)
        if "tensor" in self.levels or size > self._limit // _DETAIL_SHARE or not text:
            return
        found = {
            quantity: array if where is None else array[:, where]
            for quantity, array in arrays.items()
            if quantity in self._known or not np.isnan(array).all()
        }
        self._put_steps(first, found, text, detail=True)

    def _put_steps(
        self, first: int, arrays: Mapping[str, np.ndarray[Any, Any]], text: str, *, detail: bool = False
    ) -> None:
        if arrays:
            self._known.update(arrays)
            self._put(lambda: self._tables.add_steps(first, arrays, text, detail=detail))

    def add_batches(self, batches: Sequence[Batch]) -> None:
        """Add the samples of single steps, of which the last 512 steps and those around an alarm are kept."""
        self._put(lambda: add_batches(self._connection, batches))

    def forget_norms(self, after: int) -> None:
        """Forget the gradient norms of samples of later steps than this."""
        self._put(lambda: forget_norms(self._connection, after), must=True)

    def add_window(self, window: Window) -> None:
        """Add a closed window."""
        wall = time.time()  # of the window, not of when it is written
        self._put(lambda: self._tables.add_window(window, wall))

    def add_step_time(self, time: StepTime) -> None:
        """Add the time of some steps to that of all."""
        self._put(lambda: add_step_time(self._connection, time))

    def add_event(self, step: int, kind: str, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Add something that happened at a step."""
        wall, facts = time.time(), json.dumps(dict(data or {}), default=str)
        self._put(lambda: self._tables.add_event(step, wall, kind, text, facts), soon=True)

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything so far is in the file; return False where it is not after so many seconds, or writing
        has failed."""
        if self._process != os.getpid() or self._closed:
            return not (self.failed or self.behind)
        done, network = threading.Event(), self._network
        if network is not None:
            self._put(lambda: network.publish(self._connection), always=True)
        self._put(done.set, soon=True, always=True)
        return done.wait(timeout) and not (self.failed or self.behind)

    def write_excerpt(self, target: Path, timeout: float = 60.0) -> None:
        """Write the last 512 steps to another file, and wait until it is there, which may be after close() too.

        Raises:
            RecordError: it is not there after so many seconds, or cannot be written; writing the record has failed, so
                that it lacks the last steps; this process is a fork, which does not write it.
        """
        if self._process != os.getpid():
            raise RecordError(f"another process than this one, a fork, writes {self.path}")
        if self._closed:
            self._check_that_all_is_written()
            connection = connect(self._network.file if self._network is not None and self.behind else self.path)
            try:
                write_excerpt(connection, target)
            finally:
                connection.close()
            return
        done = threading.Event()
        errors: list[Exception] = []

        def write() -> None:
            try:
                self._check_that_all_is_written()
                write_excerpt(self._connection, target)
            except Exception as error:  # the record itself goes on
                errors.append(error)
            done.set()

        self._put(write, soon=True, always=True)
        if not done.wait(timeout):
            raise RecordError(f"the record has not written it in {timeout:g} seconds")
        for error in errors:
            raise error if isinstance(error, RecordError) else RecordError(f"{type(error).__name__}: {error}")

    def _check_that_all_is_written(self) -> None:
        if self.failed:
            raise RecordError(f"the record lacks the last steps: {self.failed}")

    def close(self) -> None:
        """Write what waits, and close the file."""
        if self._closed or self._process != os.getpid():
            return
        self.flush()
        self._closed = True
        atexit.unregister(self.close)
        if not self._thread.end(_AT_THE_END):
            # In a network's file system that hangs, say. It goes on with the file, which so stays this record's.
            where = self.path if self._network is None else self._network.file
            late = f"not everything was written in {_AT_THE_END:g} seconds; what there is lies in {where}"
            self.failed = self.failed or f"{self.path}: {late}"
            return
        with contextlib.suppress(sqlite3.Error):  # while somebody reads, say
            # One file, which can be read where nothing may be written beside it.
            self._connection.execute("pragma busy_timeout = 0")
            self._connection.execute("pragma journal_mode = delete")
        self._connection.close()
        self._hold.close()
        if self._network is not None:
            self._network.close()

    def _put(
        self,
        work: Callable[[], object],
        *,
        soon: bool = False,
        alone: bool = False,
        always: bool = False,
        must: bool = False,
    ) -> None:
        if self._closed or self._process != os.getpid():  # a forked child
            return
        if self.failed and not (always or must):
            now = time.monotonic()
            if now >= self._again:
                self._again = now + _AGAIN
                self._thread.put(self._mend, mends=True)
            return
        self._thread.put(work, soon=soon, alone=alone, always=always, must=must)

    # ---- the thread

    def _begin(self, step: int, wall: float, config: Mapping[str, Any]) -> None:
        self._tables.begin(step, wall, config)
        if self._ranks is None:
            return
        said = take_back_ranks_left(self.path.parent, self._ranks, step)
        if said:
            what = "the run goes on" if step else "this run begins"
            text = f"{what} with {self._ranks} rank{'s' * (self._ranks > 1)}: {'; '.join(said)}"
            self._tables.add_event(step, wall, "ranks left", text, "{}")
            self.left = (*self.left, text)

    def _has_failed(self, error: Exception) -> None:
        self._again = time.monotonic() + _AGAIN
        self.failed = self.failed or f"{self.path}: {type(error).__name__}: {error}"

    def _mend(self) -> None:
        """Write that there is a gap, and go on."""
        if not self.failed:  # it was asked for twice
            return
        self._tables.look_again()
        text = f"steps behind this one are missing: they could not be written ({self.failed})"
        self._tables.add_event(self._tables.last(), time.time(), "gap", text, "{}")
        self.failed = ""


def checked_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return facts about a run as JSON has them; TypeError for what is no mapping with names as keys."""
    if config is None:
        return {}
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise TypeError(f"config: expected a dict with names as keys, got {type(config).__name__}")
    return {key: json.loads(json.dumps(value, default=str)) for key, value in config.items()}
