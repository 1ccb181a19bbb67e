"""The reader of a run record, also while the training writes it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipcore.metric.results import History, Window
from lipcore.metric.show import LINES, Showable, Shown
from lipcore.models.arguments import check_count
from lipcore.models.names import listed
from lipcore.recording import plots
from lipcore.recording.batches import Batch, read_batches
from lipcore.recording.location import being_written, rank_of, was_cut_off
from lipcore.recording.pack import UnpackedWindow
from lipcore.recording.run_file import ANY, RunFile, file_of
from lipcore.recording.schema import RecordError
from lipcore.recording.series import Series
from lipcore.recording.step_series import blocks_of_steps, series_of_steps
from lipcore.recording.step_time import read_step_time
from lipcore.recording.window_series import series_of
from lipcore.report.source import Block, StepTime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lipcore.report.page import Page
    from lipcore.report.postmortem.account import Account


@dataclass(frozen=True)
class Start:
    """One beginning of a run's recording."""

    kind: str  #: "start", "resume" (behind the last step) or "rewind" (later steps were made again)
    step: int  #: steps that had been made
    wall: float  #: seconds since 1970
    config: dict[str, Any]  #: what was said about the run then


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    step: int
    wall: float  #: seconds since 1970
    kind: str
    text: str
    data: dict[str, Any]


class Run(Showable):
    """A recorded run: series of single steps and of windows, what happened, and what was said about it.

    Nothing is kept in memory: everything is read from the file when it is asked for, and what the training has written
    meanwhile is there then.

    Args:
        path: the run's folder, or the file of one rank.
        rank: whose file is read, of a folder.

    Raises:
        RecordError: there is no such record, or it cannot be read.
        ValueError: the folder has records of several ranks, and not this one's.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0) -> None:
        check_count("rank", rank, 0)
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path: expected the path of a run, got {type(path).__name__}")
        self.path = file_of(Path(path), rank)
        self._file = RunFile(self.path)

    # ---- what there is

    @property
    def config(self) -> dict[str, Any]:
        """Facts about the run, as of its last start."""
        starts = self.starts
        return starts[-1].config if starts else {}

    @property
    def starts(self) -> list[Start]:
        """Every start, resume and rewind, oldest first."""
        rows = self._file.rows("select kind, step, wall, config from starts order by id")
        return [Start(kind, step, wall, json.loads(config)) for kind, step, wall, config in rows]

    @property
    def events(self) -> list[Event]:
        """Everything that happened, by step."""
        rows = self._file.rows("select step, wall, kind, text, data from events order by step, id")
        return [Event(step, wall, kind, text, json.loads(data)) for step, wall, kind, text, data in rows]

    @property
    def last_step(self) -> int:
        """Number of the last step that is in the file; 0 where there is none."""
        rows = [self._file.rows(f"select max(last) from {table}")[0][0] for table in ("steps", "windows")]
        return max(0, *(row or 0 for row in rows))

    @property
    def first_step(self) -> int:
        """Number of the first step that is in the file; 0 where there is none."""
        rows = [self._file.rows(f"select min(first) from {table}")[0][0] for table in ("steps", "windows")]
        return min((row for row in rows if row), default=0)

    @property
    def last_wall(self) -> float:
        """Time at which a window was last written, in seconds since 1970; 0 where there is none."""
        return float(self._file.rows("select max(wall) from windows")[0][0] or 0.0)

    @property
    def step_time(self) -> StepTime:
        """Time of the steps, and what of it was spent inside lipcore's calls at their ends; the first ten steps after
        each start are left out."""
        with self._file.named() as connection:
            return read_step_time(connection)

    @property
    def steps_per_second(self) -> float:
        """Steps per second between the last two windows that were written since the last start; NaN where there are
        fewer."""
        rows = self._file.rows(
            "select last, wall from windows where wall > (select max(wall) from starts) order by last desc limit 2"
        )
        if len(rows) < 2 or rows[0][1] <= rows[1][1]:
            return float("nan")
        return float((rows[0][0] - rows[1][0]) / (rows[0][1] - rows[1][1]))

    @property
    def quantities(self) -> list[str]:
        """Names that :meth:`series` takes: quantities of single steps, then `quantity.reducer` of windows, with the
        metric's name before it where two metrics have it; what was logged is the metric "logged"."""
        return [*self._step_names(), *self._window_names()]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.path.parent.name or self.path.name

    @property
    def being_written(self) -> bool:
        """True while a training writes the file."""
        return being_written(self.path)

    @property
    def was_cut_off(self) -> bool:
        """True where the process that wrote the file has ended without closing it."""
        return was_cut_off(self.path)

    @property
    def rank(self) -> int | None:
        """Rank whose record this is; None where the file's name does not say it."""
        return rank_of(self.path)

    @property
    def ranks(self) -> list[int]:
        """Ranks whose records lie in the run's folder, this one's too."""
        found = (rank_of(path) for path in self.path.parent.iterdir())
        return sorted(rank for rank in found if rank is not None)

    def of_rank(self, rank: int) -> Run | None:
        """Return the record of another rank of this run; None where it cannot be read."""
        try:
            return Run(self.path.parent, rank)
        except (RecordError, ValueError):
            return None

    @property
    def windows(self) -> History:
        """The closed windows, oldest first."""
        return History(self.each_window())

    def places(self, name: str) -> list[str]:
        """Return the places of a quantity, in the order in which they were first written."""
        return list(self._read(name, "*").places)

    def series(self, name: str, places: str = "*") -> Series:
        """Return one quantity over the run.

        Args:
            name: of single steps ("update_norm", "loss"), or `quantity.reducer` of windows ("update_norm.mean"); with
                the metric's name before it where that alone is ambiguous ("trajectory/update_norm.mean").
            places: a pattern of places, as of file names: "layers.*", "total".

        Raises:
            KeyError: there is no such quantity, or no such place.
            ValueError: several metrics have the name.
        """
        found = self._read(name, places)
        if not found.places:
            raise KeyError(f"{name} has no place {places!r}; it has {listed(self._read(name, '*').places)}")
        return found

    def _read(self, name: str, places: str) -> Series:
        for argument, value in (("name", name), ("places", places)):
            if not isinstance(value, str):
                raise TypeError(f"{argument}: expected a str, got {type(value).__name__}")
        found = [full for full in self.step_quantities if name in (full, full.rpartition("/")[2])]
        if len(found) > 1:
            raise ValueError(f"name: several metrics have {name!r}; choose {' or '.join(found)}")
        return series_of_steps(self._file, found[0], places, name) if found else self._of_windows(name, places)

    def report(self) -> Page:
        """Make the page about this run, as it is now: a notebook shows it, ``.save("page.html")`` writes it. It needs
        bokeh: docs/report.md.

        Raises:
            ImportError: bokeh is missing.
            RecordError: the record cannot be read at all.
        """
        from lipcore.report.page import Page, page_of

        return Page(page_of(self), self.name)

    def postmortem(self, step: int | None = None, *, follow: bool | None = None) -> Account:
        """Look into a step in which something went wrong: printed, it says what moved first and in which layer, how it
        spread, which samples stand out, and what to check; docs/postmortem.md.

        Args:
            step: default: that of the worst alarm, without alarms that of the exception that ended it.
            follow: of several ranks, look into the record of the one that has the worst alarm, or ended first, where it
                lies beside; default: from rank 0's record.

        Raises:
            ValueError: the step is not in the record; there is no alarm, and no step was asked for.
        """
        from lipcore.report.postmortem.reading import account_of

        return account_of(self, step, follow=follow)

    # ---- pictures; they need matplotlib

    def plot(self, name: str, places: str = "*", *, log: bool = True) -> Figure:
        """Draw a quantity over the steps, a line per place; names as of :meth:`series`, without a reducer means."""
        return plots.line_plot(self._drawn(name, places), f"{name} of {self.name}", log=log)

    def heatmap(self, name: str, places: str = "*") -> Figure:
        """Draw a quantity as a map: a row per place, steps from left to right."""
        return plots.heat_map(self._drawn(name, places), f"{name} of {self.name}")

    def compare_plot(self, other: Run, name: str, place: str = "total", *, log: bool = True) -> Figure:
        """Draw a quantity of this run and of another in one place."""
        if not isinstance(other, Run):
            raise TypeError(f"other: expected a Run, as open_run() returns it, got {type(other).__name__}")
        found = {self.name: self._drawn(name, place)}
        twice = other.name in found
        found[f"{other.name} ({other.path})" if twice else other.name] = other._drawn(name, place)
        return plots.compare_plot(found, f"{name}, {place}", log=log)

    def _drawn(self, name: str, places: str) -> Series:
        quantities = self.quantities if isinstance(name, str) else []
        return self.series(f"{name}.mean" if name not in quantities and f"{name}.mean" in quantities else name, places)

    # ---- single steps

    @property
    def step_quantities(self) -> list[str]:
        """Full names of the quantities of single steps: "trajectory/update_norm", "logged/loss"."""
        return [row[0] for row in self._file.rows("select distinct quantity from steps order by quantity")]

    def _step_names(self) -> list[str]:
        full = self.step_quantities
        short = [name.rpartition("/")[2] for name in full]
        return [own if short.count(own) == 1 else name for name, own in zip(full, short, strict=True)]

    def blocks(self, quantity: str, first: int = 1, last: int | None = None) -> Iterator[Block]:
        """Yield the single steps of a quantity as they lie in the file, so that a long run is never in memory.

        Args:
            quantity: one of :attr:`step_quantities`.
            first, last: blocks without a step between these two are left out.
        """
        yield from blocks_of_steps(self._file, quantity, first, ANY if last is None else last)

    def batches(self, first: int = 1, last: int | None = None) -> list[Batch]:
        """Return the samples of the steps between two, of those that the flight recorder has: the last 512 of the run,
        and 32 before to 8 after each alarm (docs/postmortem.md)."""
        with self._file.named() as connection:
            return list(read_batches(connection, first, ANY if last is None else last))

    # ---- windows

    def last_whole_window(self) -> Window | None:
        """Return the newest window of all ranks, or of the only process; None where there is none."""
        rows = self._file.rows("select max(last) from windows where scope = 'global'")
        return next(self._windows_of(rows), None) if rows[0][0] is not None else None

    def each_window(self) -> Iterator[Window]:
        """Yield the closed windows, oldest first, one after the other."""
        yield from self._windows_of(self._file.rows("select last from windows order by last"))

    def _windows_of(self, steps: list[Any]) -> Iterator[Window]:
        texts = self._file.texts() if steps else {}
        for (step,) in steps:
            rows = self._file.rows(
                "select number, first, last, scope, header, floats, counts from windows where last = ?", step
            )
            if not rows:  # a rewind has removed it meanwhile
                continue
            number, first, last, scope, header, floats, counts = rows[0]
            found = UnpackedWindow(header, floats, counts, texts)
            yield Window(number, first, last, True, scope, found.results, found.off)

    def _window_names(self) -> list[str]:
        metrics: dict[str, list[str]] = {}
        for window in self.each_window():
            for metric, result in window.results.items():
                for quantity, values in result.items():
                    for part in values.parts:
                        for reducer in part.reducers:
                            names = metrics.setdefault(f"{quantity}.{reducer}", [])
                            names += [metric] * (metric not in names)
        return [
            name if len(having) == 1 else f"{metric}/{name}" for name, having in metrics.items() for metric in having
        ]

    def all_series(self) -> Iterator[Series]:
        """Yield every series of the run, with the windows read once: as :meth:`series` of all :attr:`quantities`."""
        for name in self._step_names():
            yield self._read(name, "*")
        found = series_of(self.each_window(), lambda metric, name: True)
        names = [name for _, name in found]
        for (metric, name), series in found.items():
            yield series if names.count(name) == 1 else replace(series, name=f"{metric}/{name}")

    def _of_windows(self, name: str, pattern: str) -> Series:
        metric, _, rest = name.rpartition("/")
        found = series_of(self.each_window(), lambda owner, own: own == rest and metric in ("", owner), pattern)
        having = sorted(owner for owner, _ in found)
        if not having:
            names = self.quantities
            close = difflib.get_close_matches(name, names, cutoff=0.6)
            close += [each for each in names if each.startswith(f"{name}.") and each not in close]
            hint = f"; did you mean {' or '.join(map(repr, close[:3]))}?" if close else "."
            known = ", ".join(names) or "none: nothing was recorded yet"
            raise KeyError(f"there is no {name!r} in this run{hint} It has {known}")
        if len(having) > 1:
            raise ValueError(
                f"name: several metrics have {rest!r}; choose {' or '.join(f'{m}/{rest}' for m in having)}"
            )
        return replace(found[having[0], rest], name=name)

    @contextmanager
    def as_of_now(self) -> Iterator[None]:
        """Read the file as it is now, whatever is written meanwhile, in a with block."""
        with self._file.as_of_now():
            yield

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        """Show the head of the run's report: what fired, and what was not measured."""
        from lipcore.report.page import framed, head_of

        try:
            return framed(head_of(self), 260)
        except RecordError:  # a text says why
            return super()._repr_html_()

    def _shown(self) -> Shown:
        starts, steps = self.starts, self.step_quantities
        rows = [("steps", f"{self.last_step}", ", ".join(steps))]
        rows.append(("windows", str(self._file.rows("select count(*) from windows")[0][0]), ""))
        older = self._file.rows("select value from meta where key = 'older'")
        rows += [("older run", self.path.with_name(older[0][0]).name, "")] if older else []
        rows += [(start.kind, f"at step {start.step}", "") for start in starts[-3:]]
        rows += [(f"step {event.step}", event.kind, event.text) for event in self.events[-(LINES - len(rows)) :]]
        return Shown(f"Run {self.path}", rows)


def open_run(path: str | os.PathLike[str], rank: int = 0) -> Run:
    """Open a recorded run for reading, also while it is written.

    Args:
        path: the run's folder, or the file of one rank.
        rank: whose file is read, of a folder.

    Raises:
        RecordError, ValueError: as :class:`lipcore.recording.Run`.
    """
    return Run(path, rank)
