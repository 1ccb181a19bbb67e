"""The tables of a run record, filled by one thread: where the run begins, blocks of steps, windows, events."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lipcore.metric.results import Window
from lipcore.metric.values import Level
from lipcore.recording.batches import forget_details
from lipcore.recording.folding import fold_oldest, used_bytes
from lipcore.recording.pack import PackedWindow, packed_steps, places_of, unpacked_steps

_BLOCK = 256  # steps of a block, about: a later one is joined to one that is shorter
_DETAIL_BLOCK = 64  # steps of a block of which the older ones are forgotten
_LOOK = 16  # blocks between two looks at the size of the file


class RecordTables:
    """The tables of one record's file. Everything but the constructor is called by the thread that writes.

    Args:
        connection: to the file.
        path: of the record, beside which an older run's is kept.
        copy: copies what there is to another file.
        levels: of the places of windows that are written.
        max_bytes: where the file grows beyond, older steps are folded.

    Attributes:
        older: the name that an older run's file was given.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        copy: Callable[[sqlite3.Connection, Path], None],
        levels: tuple[Level, ...],
        max_bytes: int,
    ) -> None:
        self._connection, self._path, self._levels = connection, path, levels
        self._limit, self._copy = max_bytes, copy
        self.older = ""
        self._blocks, self._begun = 0, False
        self.look_again()

    def look_again(self) -> None:
        """Read which layouts the file has: those of a transaction that was taken back are gone."""
        rows = self._execute("select id, text from layouts").fetchall()
        self._layouts: dict[str, int] = {text: number for number, text in rows}
        self._places = {number: len(places_of(text)) for number, text in rows}

    def _execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(sql, values)

    def begin(self, step: int, wall: float, config: Mapping[str, Any]) -> None:
        """Begin, or go on, behind a step, at this time, with facts as JSON has them; what there is of later ones is
        removed."""
        last = self.last()
        if step == 0 and last and not self._begun:
            self.older = self.set_aside()
            last = 0
        kind = "rewind" if step < last else "resume" if last or self._begun else "start"
        self._execute("begin")
        if step < last:
            self._cut(step)
        self._execute(
            "insert into starts(kind, step, wall, config) values(?, ?, ?, ?)",
            (kind, step, wall, json.dumps(config)),
        )
        self._execute("commit")
        self._begun = True

    def last(self) -> int:
        """Return the last step that the file has something of."""
        rows = [self._execute(f"select max(last) from {table}").fetchone()[0] for table in ("steps", "windows")]
        return max(0, *(int(row or 0) for row in rows))

    def _cut(self, step: int) -> None:
        """Remove everything that is later than a step."""
        self._execute("delete from windows where last > ?", (step,))
        self._execute("delete from events where step > ?", (step,))
        self._execute("delete from batches where step > ?", (step,))
        across = self._execute(
            "select quantity, first, layout, fold, data from steps where first <= ? and last > ?", (step, step)
        ).fetchall()
        for quantity, first, layout, fold, data in across:
            kept = step - first + 1
            if fold == 1:
                data = packed_steps(unpacked_steps(data, self._places[layout])[:kept])
                self._execute(
                    "update steps set last = ?, data = ? where quantity = ? and first = ? and layout = ?",
                    (step, data, quantity, first, layout),
                )
            else:  # minima and maxima may be of steps that go: the block is what it was, up to whole groups
                groups = kept // fold
                three = np.frombuffer(data, "<f4").reshape(3, self._places[layout], -1)[..., :groups]
                self._execute(
                    "update steps set last = ?, data = ? where quantity = ? and first = ? and layout = ?",
                    (first + groups * fold - 1, np.ascontiguousarray(three).tobytes(), quantity, first, layout),
                )
        self._execute("delete from steps where first > ? or last < first", (step,))

    def has_later(self, step: int) -> bool:
        """Return whether there is anything of a later step than this."""
        events = self._execute("select max(step) from events").fetchone()[0]
        return max(self.last(), int(events or 0)) > step

    def take_back(self, step: int, wall: float, kind: str, text: str) -> None:
        """Remove everything that is later than a step, and add that this happened there."""
        self._execute("begin")
        self._cut(step)
        self.add_event(step, wall, kind, text, "{}")
        self._execute("commit")

    def set_aside(self) -> str:
        """Copy an older run's record to a file of another name, which is returned, and empty this one: who is reading
        it goes on, which a file that is renamed would not let him do."""
        number = 1
        while (older := self._path.with_name(f"{self._path.stem}-before-{number}.older")).exists():
            number += 1
        self._copy(self._connection, older)
        self._execute("begin")
        for table in ("starts", "steps", "windows", "events", "batches"):
            self._execute(f"delete from {table}")
        self._execute("insert or replace into meta values('older', ?)", (older.name,))
        self._execute("delete from meta where key = 'step_time'")
        self._execute("commit")
        return older.name

    def _layout(self, text: str) -> int:
        if text not in self._layouts:
            number = int(self._execute("insert into layouts(text) values(?)", (text,)).lastrowid or 0)
            self._layouts[text], self._places[number] = number, len(places_of(text))
        return self._layouts[text]

    def add_steps(
        self, first: int, arrays: Mapping[str, np.ndarray[Any, Any]], text: str, *, detail: bool = False
    ) -> None:
        """Add numbers of single steps by quantity, [steps, places], of the places of this text; of `detail`, the older
        ones are forgotten."""
        layout = self._layout(text)
        for quantity, values in arrays.items():
            self._add_block(quantity, first, values, layout, _DETAIL_BLOCK if detail else _BLOCK)
            if detail:
                forget_details(self._connection, quantity, first + len(values) - 1)
        looked, self._blocks = self._blocks // _LOOK, self._blocks + len(arrays)
        if self._blocks // _LOOK > looked and used_bytes(self._connection) > self._limit:
            self._make_room()

    def _add_block(self, quantity: str, first: int, values: np.ndarray[Any, Any], layout: int, longest: int) -> None:
        last = first + len(values) - 1
        before = self._execute(
            "select first, data from steps where quantity = ? and layout = ? and last = ? and fold = 1"
            " and first > ? order by first desc limit 1",
            (quantity, layout, first - 1, first - longest),
        ).fetchone()
        if before is not None:
            values = np.concatenate([unpacked_steps(before[1], self._places[layout]), values])
            first = before[0]
        self._execute(
            "insert or replace into steps values(?, ?, ?, ?, 1, ?)",
            (quantity, layout, first, last, packed_steps(values)),
        )

    def _make_room(self) -> None:
        while used_bytes(self._connection) > 0.8 * self._limit and fold_oldest(self._connection, self._places):
            pass

    def add_window(self, window: Window, wall: float) -> None:
        """Add a window that was closed at this time."""
        packed = PackedWindow(window, self._levels)
        layouts = [self._layout(text) for text in packed.layouts]
        header, floats, counts = packed.blobs(layouts)
        self._execute(
            "insert or replace into windows values(?, ?, ?, ?, ?, ?, ?, ?)",
            (window.last_step, window.first_step, window.index, window.scope, wall, header, floats, counts),
        )

    def add_event(self, step: int, wall: float, kind: str, text: str, data: str) -> None:
        """Add something that happened at a step, at this time."""
        self._execute(
            "insert into events(step, wall, kind, text, data) values(?, ?, ?, ?, ?)", (step, wall, kind, text, data)
        )
