"""Records of the ranks of a run: which of them tells what went wrong, and what happened on the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from lipcore.report.alarms_told import LIGHT, SAMPLES, worst_first
from lipcore.report.source import Happened, Source

_HERE = -1  # in place of a rank: the record that was asked for
_SECONDS = 5.0  # by which clocks of ranks may differ


@dataclass(frozen=True)
class OfRank:
    """Events of a rank, as its record has them: its own, without those that it was told by others."""

    rank: int
    events: Sequence[Happened]
    first_step: int
    last_step: int
    was_cut_off: bool


@dataclass(frozen=True)
class Looked:
    """Record that is looked into.

    Attributes:
        run: of the rank that has the event.
        event: the alarm or the end of the run, its own or told by another rank; None: there is none.
        asked: the record that was asked for is another rank's; its rank.
        ranks: what each rank's record says, where there are several that can be read.
    """

    run: Source
    event: Happened | None
    asked: int | None = None
    ranks: Sequence[OfRank] = field(default_factory=list)

    @property
    def others(self) -> list[OfRank]:
        """The ranks but the one that is looked into."""
        return [one for one in self.ranks if one.rank != self.run.rank]


@contextmanager
def looked_into(run: Source, step: int | None, *, follow: bool | None = None) -> Iterator[Looked]:
    """Choose the event that is looked at, and open the record of the rank that has it.

    Args:
        step: of the event; None: the worst alarm, without alarms the exception that ended it, of several ranks the one
            that ended first.
        follow: choose among the events of all ranks whose records lie beside; default: from rank 0's record.
    """
    ranks = _ranks(run)
    told = [event for event in run.events if is_told(event)]
    if ranks and (run.rank == 0 if follow is None else follow):
        rank, event = _chosen([*ranks, _here([one for one in told if not _is_known(one, ranks)])], step)
    else:
        rank, event = _chosen([_here([event for event in run.events if not is_told(event)])], step)
        if event is None or event.kind != "alarm":
            rank, event = _chosen([_here([*told, *([] if event is None else [event])])], step)
    other = run.of_rank(rank) if rank not in (_HERE, run.rank) else None
    try:
        yield Looked(run, event, None, ranks) if other is None else Looked(other, event, run.rank, ranks)
    finally:
        if other is not None:
            other.close()


def _here(events: Sequence[Happened]) -> OfRank:
    return OfRank(_HERE, events, 0, 0, was_cut_off=False)


def _is_known(told: Happened, ranks: Sequence[OfRank]) -> bool:
    """Say whether the record of the rank that has told an alarm has it too."""
    own = [event for one in ranks if one.rank == told.data["rank"] for event in one.events if event.step == told.step]
    return any(event.data.get("signal") == told.data.get("signal") for event in own)


def is_told(event: Happened) -> bool:
    """Say whether an event is an alarm that another rank has told."""
    return event.data.get("rank") is not None


def _ranks(run: Source) -> list[OfRank]:
    """Return what the records of all ranks say, this one's first; nothing where it is the only one."""
    numbers = list(run.ranks) if run.rank is not None else []
    if len(numbers) < 2:
        return []
    start = run.starts[-1] if run.starts else None
    found = []
    for rank in sorted(numbers, key=lambda rank: rank != run.rank):
        one = run if rank == run.rank else run.of_rank(rank)
        if one is None:
            continue
        with suppress(RuntimeError, ValueError, KeyError):  # one that is damaged says nothing
            events = [event for event in one.events if not is_told(event)]
            if one is not run and start is not None:
                # What is left of more ranks before a rewind is of steps that were made again since.
                events = [each for each in events if each.step <= start.step or each.wall >= start.wall - _SECONDS]
            found.append(OfRank(rank, events, one.first_step, one.last_step, one.was_cut_off))
        if one is not run:
            one.close()
    return found


def _chosen(ranks: Sequence[OfRank], step: int | None) -> tuple[int, Happened | None]:
    """Return the worst alarm, of a step where one is given, and the rank that has it; without alarms and without a step
    the first of the exceptions that ended the ranks."""
    of = {id(event): one.rank for one in ranks for event in one.events}
    alarms = [event for one in ranks for event in one.events if event.kind == "alarm" and step in (None, event.step)]
    for event in worst_first(alarms):
        return of[id(event)], event
    ends = [next((event for event in reversed(one.events) if event.kind == "exception"), None) for one in ranks]
    first = min((end for end in ends if end is not None and step is None), key=lambda end: end.wall, default=None)
    return _HERE if first is None else of[id(first)], first


def happened_on(others: Sequence[OfRank], first: int, last: int) -> list[tuple[int, Happened]]:
    """Return rank and event of what happened on other ranks between two steps."""
    found = [(one.rank, event) for one in others for event in one.events if first <= event.step <= last]
    return [(rank, event) for rank, event in found if event.kind not in (SAMPLES, LIGHT)]


def cut_off(looked: Looked) -> list[str]:
    """Say of the ranks whose records break off without a word about their end that they do, this one's first."""
    run = looked.run
    found = [("The record", run.last_step)] if run.was_cut_off else []
    if looked.others:
        found = [(f"The record of rank {one.rank}", one.last_step) for one in looked.ranks if one.was_cut_off]
    furthest = max((one.last_step for one in looked.ranks), default=0)
    told = []
    for what, last in found:
        beyond = f", where others go on to step {furthest:,}" if furthest > last else ""
        said = f"breaks off at step {last:,} without a word about its end{beyond}"
        told.append(f"{what} {said}: its process was killed (SIGKILL, out of memory)")
    return told
