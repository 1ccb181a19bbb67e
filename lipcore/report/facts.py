"""All that a page is made of, read from a record in one go and reduced to what a screen can show."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.covered import Covered, covered
from lipcore.report.largest_samples import LargestSamples
from lipcore.report.left_out import LeftOut
from lipcore.report.source import Block, Happened, Source, Started, StepTime
from lipcore.report.statements import Statement, Theory
from lipcore.report.window_facts import WindowFacts

_LINE = 2000  # bins of a line
_CELLS = 65_000  # of the map, which are most of the page
_COLUMNS = 400
_UPDATE, _WEIGHT = "trajectory/update_norm", "trajectory/weight_norm"


@dataclass
class Facts:
    """Facts of a run, reduced to what a screen can show.

    Attributes:
        lines: totals of single steps by full name ("trajectory/update_norm", "logged/loss").
        left_out: steps in which a parameter was not finite, by group.
        ratios: update over weight norm of the finest places that are recorded, in the bins of the map.
        unread: what could not be read, and why.
    """

    name: str
    path: str
    being_written: bool = False
    starts: list[Started] = field(default_factory=list)
    events: list[Happened] = field(default_factory=list)
    first_step: int = 0
    last_step: int = 0
    last_wall: float = 0.0  #: seconds since 1970, when a window was last written
    lines: dict[str, Binned] = field(default_factory=dict)
    ratios: Binned | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    folded: bool = False
    windows: WindowFacts = field(default_factory=WindowFacts)
    step_time: StepTime = field(default_factory=StepTime)
    samples: LargestSamples = field(default_factory=LargestSamples)
    theory: list[Statement] = field(default_factory=list)  #: about the whole run
    unread: list[str] = field(default_factory=list)
    rank: int | None = None  #: whose record it is
    ranks: list[int] = field(default_factory=list)  #: all whose records lie beside, this one's too

    @property
    def config(self) -> dict[str, Any]:
        """Facts about the run, as of its last start."""
        return dict(self.starts[-1].config) if self.starts else {}

    @property
    def covered(self) -> Covered:
        """Coverage of the single steps."""
        return covered(self.starts, self.windows.scopes)

    @property
    def alarms(self) -> list[Happened]:
        """Alarms, by step."""
        return [event for event in self.events if event.kind == "alarm"]


def facts_of(run: Source) -> Facts:
    """Read a run. What cannot be read is said in :attr:`Facts.unread`, and the rest goes on."""
    facts = Facts(run.name, str(run.path), run.being_written)

    def tried(what: str, read: Callable[[], None]) -> None:
        try:
            read()
        except _UNREADABLE as error:
            facts.unread.append(f"{what}: {error}")

    with run.as_of_now():
        tried("ranks", lambda: _read_ranks(facts, run))
        tried("starts", lambda: facts.starts.extend(run.starts))
        tried("events", lambda: facts.events.extend(run.events))
        quantities: list[str] = []
        tried("single steps", lambda: quantities.extend(run.step_quantities))
        tried("steps that are not finite", lambda: setattr(facts, "left_out", LeftOut.of(run)))
        tried("number of steps", lambda: _read_extent(facts, run))
        for quantity in quantities:
            tried(quantity, lambda quantity=quantity: _read_line(facts, run, quantity))  # type: ignore[misc]
        if _UPDATE in quantities and _WEIGHT in quantities:
            tried("update ratio", lambda: _read_ratios(facts, run))
        theory = Theory()
        tried("windows", lambda: _read_windows(facts, run, theory))
        tried("theory", lambda: setattr(facts, "theory", theory.statements()))
        tried("time of steps", lambda: setattr(facts, "step_time", run.step_time))
        tried("samples", lambda: setattr(facts, "samples", LargestSamples.of(run.batches())))
    return facts


#: What reading a file that is cut off or damaged raises; RecordError, which cannot be imported here, is a RuntimeError.
_UNREADABLE = (RuntimeError, sqlite3.Error, zlib.error, ValueError, KeyError, IndexError, TypeError)


def _read_ranks(facts: Facts, run: Source) -> None:
    facts.rank, facts.ranks = run.rank, list(run.ranks)


def _read_extent(facts: Facts, run: Source) -> None:
    facts.first_step, facts.last_step, facts.last_wall = run.first_step, run.last_step, run.last_wall


def _read_line(facts: Facts, run: Source, quantity: str) -> None:
    found = Binned(facts.first_step, facts.last_step, _LINE)
    for block in facts.left_out.blocks(run, quantity):
        where = [i for i, level in enumerate(block.levels) if level == "total"]
        low, high = (None, None) if block.low is block.values else (block.low[:, where], block.high[:, where])
        names = [block.places[i] for i in where]
        found.add(block.steps, names, block.values[:, where], low, high, ["total"] * len(where))
    if found.places:
        facts.lines[quantity] = found


def _read_windows(facts: Facts, run: Source, theory: Theory) -> None:
    facts.windows = WindowFacts(facts.first_step, facts.last_step)
    for window in run.each_window():
        facts.windows.take(window)
        theory.take(window)
    facts.windows.finish()


def _read_ratios(facts: Facts, run: Source) -> None:
    found: Binned | None = None
    for block, none in _ratio_blocks(run, facts.left_out):
        level = "tensor" if "tensor" in block.levels else "group" if "group" in block.levels else "total"
        where = [i for i, each in enumerate(block.levels) if each == level]
        if found is None:
            most = min(_COLUMNS, max(40, _CELLS // max(len(where), 1)))
            found = Binned(facts.first_step, facts.last_step, most)
        facts.folded |= block.low is not block.values
        names, levels = [block.places[i] for i in where], [level] * len(where)
        values, low, high = (array[:, where] for array in (block.values, block.low, block.high))
        found.add(block.steps, names, values, low, high, levels)
        found.forgive(block.steps, names, none[:, where])
    facts.ratios = found


def _ratio_blocks(run: Source, left_out: LeftOut) -> Iterator[tuple[Block, Any]]:
    """Yield update over weight norm, and where there is none, since the weights are 0. Of folded steps the extremes are
    bounds: the weights' are not of the same step."""
    weights = left_out.blocks(run, _WEIGHT)
    waiting: dict[tuple[int, int, int], Block] = {}
    for update in left_out.blocks(run, _UPDATE):
        key = _key(update)
        while key not in waiting:
            weight = next(weights, None)
            if weight is None:
                break
            waiting = {k: v for k, v in waiting.items() if k[0] >= int(update.steps[0])} | {_key(weight): weight}
        weight = waiting.pop(key, None)
        if weight is None or len(weight.places) != len(update.places):
            continue
        with np.errstate(all="ignore"):
            mean, low, high = (
                np.where(over > 0, np.asarray(norm, np.float64) / over, np.nan)
                for norm, over in (
                    (update.values, weight.values),
                    (update.low, weight.high),
                    (update.high, weight.low),
                )
            )
        single = update.low is update.values
        ends = (mean, mean) if single else (low, high)
        yield Block(update.steps, update.places, update.levels, mean, *ends), np.asarray(weight.values) == 0


def _key(block: Block) -> tuple[int, int, int]:
    return int(block.steps[0]), int(block.steps[-1]), len(block.places)
