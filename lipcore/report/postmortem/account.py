"""The account of what went wrong in a step: facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lipcore.report.alarms_told import is_unexplained
from lipcore.report.postmortem.changes import Change
from lipcore.report.postmortem.rates import Rate
from lipcore.report.postmortem.samples import Samples
from lipcore.report.source import Happened

UPDATE = "trajectory/update_norm"


@dataclass(frozen=True)
class Clipping:
    """Norm of the whole gradient, before and after it was clipped, in the step and usually; NaN for what is unknown."""

    before: float
    after: float
    usual: float


@dataclass
class Account:
    """Account of what went wrong in a step of a run.

    Attributes:
        run: its name.
        step: what is looked at.
        event: the alarm, or the end of the run, that it was chosen by; None where it was asked for.
        first, last: the steps that were looked at.
        begin: the step in which it began.
        changes: what changed, in order.
        compared: steps that it was compared with; 0 where there were too few.
        beyond: the place whose update is most out of proportion to its gradient where it began, and how many times.
        gradients_usual: the norms of gradients are known where it began, and there was no alarm on them near by.
        weakest: the largest score that is no change, where there is no change.
        samples: of the step in which it began, and of `step` where that is another one.
        named: sentences on the samples with the largest gradient norms in the steps after alarms near by.
        rates: of the step in which it began.
        scale: of a GradScaler, in the step in which it began and in the step before; None where it was not recorded.
        logged: what else was logged: name, value in the step in which it began, in the step before.
        others: other alarms and ends of the run near by.
        rank: whose record all of this is from; None where its file's name does not say it.
        asked: the rank whose record was asked for, where this is another's, which has the event.
        ranks: other ranks of the run whose records can be read.
        elsewhere: rank and event of what happened near by on these.
        cut_off: sentences on ranks whose records break off.
        parted: sentences on the steps around that were made on another number of ranks, or are of other parts of the
            parameters, and are not compared with.
        missing: what the record does not have, and how it is recorded.
        folded: some of the steps are in the record as means of 64 alone.
        text: all of it in words.
    """

    run: str
    step: int
    event: Happened | None
    first: int
    last: int
    begin: int
    changes: Sequence[Change] = ()
    compared: int = 0
    beyond: tuple[str, float] | None = None
    gradients_usual: bool = False
    weakest: tuple[str, str, int, float] | None = None
    samples: Sequence[Samples] = ()
    named: Sequence[str] = ()
    rates: Sequence[Rate] = ()
    clipping: Clipping | None = None
    scale: tuple[float, float] | None = None
    logged: Sequence[tuple[str, float, float]] = ()
    others: Sequence[Happened] = ()
    rank: int | None = None
    asked: int | None = None
    ranks: Sequence[int] = ()
    elsewhere: Sequence[tuple[int, Happened]] = ()
    cut_off: Sequence[str] = ()
    parted: Sequence[str] = ()
    missing: Sequence[tuple[str, str]] = field(default_factory=list)
    folded: bool = False
    text: str = ""

    @property
    def at_begin(self) -> list[Change]:
        """Changes of the first step in which there are any; first what a step makes first, or an update that is out
        of proportion."""
        found = [one for one in self.changes if one.step == self.changes[0].step]
        cause = None if self.beyond is None else (UPDATE, self.beyond[0])
        return sorted(found, key=lambda one: ((one.quantity, one.place) != cause, one.stage))  # in a stage by score

    @property
    def places(self) -> list[Change]:
        """The first change of each place but the total, of that what a step makes first: how it spread."""
        found: dict[str, Change] = {}
        for one in [*self.at_begin[:1], *self.changes]:
            before = found.get(one.place)
            sooner = before is not None and before.step == one.step and one.stage < before.stage
            cause = self.beyond is not None and one.place == self.beyond[0]
            if one.place != "total" and (before is None or (sooner and not cause)):
                found[one.place] = one
        return list(found.values())

    @property
    def unexplained(self) -> list[Happened]:
        """Alarms of movement that the optimizer did not make, in the step that is looked at, where it began, or before;
        by step."""
        events = [*([] if self.event is None else [self.event]), *self.others]
        last = max(self.step, self.begin)
        return sorted((one for one in events if is_unexplained(one) and one.step <= last), key=lambda one: one.step)

    @property
    def jumps(self) -> list[Rate]:
        """Learning rates that jumped where something changed: upwards, or to less where updates became smaller, since a
        schedule may go down in steps."""
        fell = any(one.quantity == UPDATE and one.times < 1 for one in self.at_begin) if self.changes else False
        return [rate for rate in self.rates if rate.jumped and self.changes and (fell or rate.here > rate.before)]

    def __str__(self) -> str:
        return self.text
