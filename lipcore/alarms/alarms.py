"""Alarms: what users see."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lipcore.alarms.budget import Budget
from lipcore.alarms.event import AlarmEvent, AlarmStop
from lipcore.alarms.light import QUANTITY, WarningLight
from lipcore.alarms.ranks import EventsOfRanks
from lipcore.alarms.rates import CommonRate
from lipcore.alarms.sample_ids import SampleIds
from lipcore.alarms.samples import SamplesAfter, SamplesAfterAlarm
from lipcore.alarms.signals import checked_signals
from lipcore.alarms.snapshot import Snapshot
from lipcore.alarms.step_checks import StepChecks
from lipcore.alarms.waiting import Waiting
from lipcore.metric.show import LINES, Showable, Shown, shortened
from lipcore.models.arguments import check_count
from lipcore.trajectory.step_stream import StepArrays

_LOGGER = logging.getLogger("lipcore")


class Alarms(Showable):
    r"""Alarms of a Monitor: steps that are not as usual, and the layer.

    Every signal x is compared with its own last 100 quiet steps, the step itself excluded:

    .. math:: z = \frac{\log x - \mathrm{median}}{1.4826\, \mathrm{MAD} + 0.01}

    ========================  ==================================================================  ============
    signal                    x                                                                   limit
    ========================  ==================================================================  ============
    ``loss``                  what :meth:`Monitor.log` is given as ``loss``                       z > 3
    ``update_norm``           norm of each group's update, over the learning rate                 abs(z) > 6
    ``grad_norm``             norm of each group's gradient, as backward left it                  abs(z) > 6
    ``rms_t``                 of each group's gradient over the root of Adam's second moment      abs(z) > 8
    ========================  ==================================================================  ============

    ``rms_t`` is looked at where `signals` names it, and comes from a ``Trajectory(source="optimizer", stats=[...,
    "rms_t"])``.

    Beside z a cumulative sum finds smaller changes that last: S = max(0, S + z / limit - 1/2) > 5. Nothing alarms in
    the first 100 steps, nor in the 20 after an alarm. One multiplier of all limits, at least 1, or `least_multiplier`,
    is calibrated on the run, by the last 4000 steps, so that alarms come to keep to the budget, after some thousand
    steps. It is 1 at first, and falls below no sooner than after 200 steps. Peaks of the score count in phases of their
    own kind: where the learning rate rises, where it is constant, where it falls. Where an update's norm stands out,
    the alarm names that group; of a gradient's fault, the group whose gradient does.

    ``nonfinite`` is exact and outside the budget: the step in which a loss, a gradient or a parameter becomes NaN or
    infinite, and which parameter. So is ``unexplained_movement``, where `signals` names it: the step in which a
    parameter moved by what SGD, Adam or AdamW did not do, against the optimizer's state; docs/alarms.md says what it
    finds. It needs a ``lipcore.Trajectory()``, and reads the optimizer's state in every step; where that is in mode
    "exact" every parameter is checked in every step, else they take turns, and what lasts is found.

    ``sample_ids`` is exact too, where the loop says the samples and the epoch, ``monitor.log_batch(ids, epoch=...)``:
    a sample that comes more than once in an epoch, and, on one rank, as many samples as a batch or more that came in
    an earlier epoch and not in the one that has ended.

    An alarm is heard of in its step or in one of the next two; where steps are short, within 10 ms.
    :meth:`Monitor.close` hands on all. Each alarm is a warning of the logger "lipcore", an event in the record of
    :func:`lipcore.watch`, and a call of `on_event`. The training is never changed, and nothing is raised in it.

    Args:
        budget: alarms per 1000 steps.
        signals: names of signals, or limits by name; default the first three.
        on_event: called with every :class:`AlarmEvent`. What it raises is raised by the user's next call of a method of
            the Monitor, and it is not called any more.
        stop: raise :class:`AlarmStop` at the user's next call of a method of the Monitor, or at the end of the with
            block. On several ranks that merge windows all of them raise the same one where they do so; what comes after
            the last merged window stops none. Ranks that merge none, and all call :meth:`Monitor.log` or
            :meth:`Monitor.log_batch`, raise it together in one of these calls some steps later, or none does.
        least_multiplier: what the multiplier of the limits falls to at the lowest, from 0.1 to 1. Below 1, alarms use
            what the limits leave of the budget.
        snapshot: files to write after an alarm.
        per_sample: for how many steps after an alarm the gradient norms of single samples are measured, to name those
            with the largest, in :attr:`samples`, a warning, and the record. It needs a
            :class:`lipcore.PerSampleGradNorms` among the metrics of the Monitor, whose hooks are off until then. Of
            another rank's alarm these are the steps behind the call that merges windows, which says so. What
            stops the metric there (a model that mixes samples, a parameter that no rule covers) is a warning, and
            raised nowhere.

    Raises:
        TypeError, ValueError: an argument is no such thing.

    >>> Alarms(budget=2.0, signals={"loss": 4.0, "update_norm": 6.0})
    Alarms: 0 in 0 steps; budget 2 per 1000; multiplier of the limits 1
      loss         limit 4  upwards
      update_norm  limit 6  both ways
      nonfinite    exact
    """

    def __init__(
        self,
        budget: float = 1.0,
        *,
        signals: Mapping[str, float] | Iterable[str] | None = None,
        on_event: Callable[[AlarmEvent], object] | None = None,
        stop: bool = False,
        least_multiplier: float = 1.0,
        snapshot: Snapshot | None = None,
        per_sample: int | None = None,
    ) -> None:
        per_1000 = _checked_budget(budget)
        least = _checked_least(least_multiplier)
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event: expected a callable (event) or None, got {type(on_event).__name__}")
        if not isinstance(stop, bool):
            raise TypeError(f"stop: expected True or False, got {stop!r}")
        if snapshot is not None and not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot: expected a lipcore.alarms.Snapshot or None, got {type(snapshot).__name__}")
        check_count("per_sample", per_sample, optional=True)
        self.per_sample = per_sample  #: None: no samples are named
        self.samples: list[SamplesAfterAlarm] = []  #: with the largest gradient norms after alarms, oldest first
        self._samples_after: SamplesAfter | None = None
        self.snapshot = snapshot  #: None: no files are written
        self.signals = checked_signals(signals)  #: by name
        self.events: list[AlarmEvent] = []  #: all of them, oldest first
        self._budget, self._on_event, self._stop = Budget(per_1000, least), on_event, stop
        #: Larger normalised updates than usual, which go before some spikes of the loss: not an alarm. It needs a
        #: Trajectory with ``source="optimizer"``, of Adam or AdamW.
        self.light = WarningLight()
        self._waiting, self._sample_ids = Waiting(), SampleIds()
        self._checks = StepChecks(self.signals, self._budget)
        self._turns: Callable[[], int] = lambda: 1
        self._stopped: Callable[[], bool] = lambda: False
        self._record: Callable[[AlarmEvent], None] | None = None
        self._record_light: Callable[[int, str], None] | None = None
        self._record_samples: Callable[[SamplesAfterAlarm], None] | None = None
        self._hearers: list[Callable[[AlarmEvent], None]] = []  # of every alarm, of other ranks too
        self._keep: Callable[[Exception], None] | None = None  # None while it belongs to no Monitor
        self._logs: Callable[[], bool] = lambda: False
        self._logged_to: Callable[[], int] = lambda: 0
        self._meets: Callable[[], bool] = lambda: False
        self._of_ranks = EventsOfRanks()
        self._waits_to_stop: AlarmEvent | None = None
        self._has_norms = False
        self._rate = CommonRate([])
        self._log_factor = 0.0  # of the step that was made last

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy has: the events, and nobody to call."""
        gone = dict.fromkeys(("_on_event", "_record", "_record_light", "_record_samples", "_logs", "_meets", "_rate"))
        gone |= dict.fromkeys(("_samples_after", "_turns", "_stopped", "_logged_to"))
        return self.__dict__ | gone | {"_keep": None, "_hearers": []}

    @property
    def global_events(self) -> list[AlarmEvent]:
        """Events of all ranks, the same on each, by step: as the ranks have told each other where windows were merged
        (:meth:`Monitor.global_window`, or :meth:`Monitor.log` under :func:`lipcore.watch`), each with the ``rank`` that
        told it first. Without other ranks, :attr:`events`."""
        together = bool(self._of_ranks.all) or (self._meets is not None and self._meets())
        return self._of_ranks.all if together else self.events

    @property
    def rate(self) -> float:
        """Alarms per 1000 steps that there really were, without those of non-finite values; NaN before the first
        step that was compared."""
        return self._budget.met

    @property
    def multiplier(self) -> float:
        """Factor of all limits, by which alarms keep to the budget."""
        return self._budget.multiplier

    @property
    def needs_norms(self) -> bool:
        """True where a signal is of groups of parameters, which a Trajectory measures."""
        return any(signal.of_groups for signal in self.signals.values())

    def _shown(self) -> Shown:
        budget = self._budget
        met = f", {self.rate:.3g} per 1000" if budget.steps else ""
        title = f"Alarms: {budget.alarms} in {budget.steps} steps{met}; budget {budget.per_1000:g} per 1000"
        out = Shown(f"{title}; multiplier of the limits {budget.multiplier:.3g}")
        for signal in self.signals.values():
            if signal.exact:
                out.rows.append((signal.name, "exact", ""))
                continue
            ways = "both ways" if signal.two_sided else "upwards"
            out.rows.append((signal.name, f"limit {signal.limit:g}  {ways}", ""))
        out.rows.append(("nonfinite", "exact", ""))
        if self.light.is_known:
            state = f"on since step {self.light.since}" if self.light.is_on else "off"
            out.rows.append(("warning light", state, f"on in {self.light.steps} steps so far"))
        if self.samples:
            out.rows.append(
                (f"steps {self.samples[-1].first} to {self.samples[-1].last}", "samples", self.samples[-1].message)
            )
        newest = [(f"step {event.step}", event.signal, event.message) for event in reversed(self.events)]
        out.rows += shortened(newest, LINES - 2 - len(out.rows))
        return out

    # ---- of a Monitor

    def _begin(
        self,
        optimizers: Sequence[Any],
        keep: Callable[[Exception], None],
        logs: Callable[[], bool],
        *,
        has_norms: bool,
        meets: Callable[[], bool] = lambda: False,
        turns: Callable[[], int] = lambda: 1,
        stopped: Callable[[], bool] = lambda: False,
        logged_to: Callable[[], int] = lambda: 0,
    ) -> None:
        """Belong to a Monitor: `keep` takes errors for the user's next call, `logs` says whether the loop logs, `meets`
        whether there are other ranks that it meets; in `turns` steps, as of now, each parameter's movement is checked
        once; what brings norms has `stopped`, and brings no more; what was logged of the steps up to `logged_to` is
        here, all of it."""
        self._turns, self._stopped, self._logged_to = turns, stopped, logged_to
        self._rate, self._keep, self._logs, self._has_norms = CommonRate(optimizers), keep, logs, has_norms
        self._meets = meets

    def _let_go(self) -> None:
        """Belong to no Monitor any more: one that has made no step."""
        self._keep = self._samples_after = None
        self._hearers.clear()

    def _write_to(
        self,
        record: Callable[[AlarmEvent], None],
        light: Callable[[int, str], None],
        samples: Callable[[SamplesAfterAlarm], None],
    ) -> None:
        """Write events to a record too, when the warning light goes on, and samples after alarms."""
        self._record, self._record_light, self._record_samples = record, light, samples

    def _name_samples(self, after: SamplesAfter) -> None:
        """Have a metric of single samples' gradient norms switched on after alarms."""
        self._samples_after = after
        self._hearers.append(after.hear)

    def _tell_samples(self, found: SamplesAfterAlarm) -> None:
        """Take the samples with the largest gradient norms after an alarm."""
        self.samples.append(found)
        _LOGGER.log(logging.WARNING if found.stands_out or not found.count else logging.INFO, "%s", found.message)
        if self._record_samples is not None:
            self._record_samples(found)

    def _note_step(self) -> None:
        """Look at the learning rate of a step that was made just now: when it is taken in, it may be the next one's."""
        self._log_factor = self._rate.log_factor()

    def _begin_step(self, step: int) -> None:
        """Note that a step is taken in, and look at whether the ranks still meet to stop together."""
        if self._waits_to_stop is not None and not self._meets():
            self._part()
        self._waiting.begin_step(step, self._log_factor)
        if self._samples_after is not None:
            self._samples_after.begin_step(step)

    def _norms(self, first: int, arrays: StepArrays) -> None:
        """Take a Trajectory's numbers of single steps."""
        self._waiting.add_norms(first, arrays)
        self._go_on()

    def _logged(self, first: int, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Take what the loop has logged."""
        self._waiting.add_logged(first, arrays)
        self._go_on()

    def _batch(self, step: int, epoch: int, ids: Tensor) -> None:
        """Take the samples of a micro-batch."""
        self._sample_ids.add(step, epoch, ids)
        self._tell_of_samples()

    def _tell_of_samples(self, *, wait: bool = False) -> None:
        for event in self._sample_ids.events(wait=wait):
            self._tell(event)

    def _go_behind(self, step: int) -> None:
        """Go on behind this step: a checkpoint was loaded. The next 100 steps are silent."""
        self._waiting.forget(step)
        self._checks.begin_anew()
        self.light.forget(step)
        self._sample_ids = SampleIds()  # which of an epoch have come is not known behind a checkpoint
        self.events[:] = [event for event in self.events if event.step <= step]
        self.samples[:] = [found for found in self.samples if found.last <= step]
        if self._samples_after is not None:
            self._samples_after.forget()
        self._of_ranks.forget(step)
        self._waits_to_stop = None

    def _said(self) -> list[list[Any]]:
        """Return what the other ranks are to hear of."""
        return self._of_ranks.said()

    def _heard(self, said: Mapping[int, Any]) -> None:
        """Take what each rank has said: what this one has not told itself is told here too, and all stop together."""
        new, of_others = self._of_ranks.heard(said)
        for event in of_others:
            self._act(event)
        self._waits_to_stop = None
        if self._stop and new:
            self._keep_error(AlarmStop(new[0]))

    def _wait_to_stop(self, event: AlarmEvent) -> bool:
        """Wait for the other ranks with a stop that was to be this one's alone, since they are met after all; return
        whether they are still to hear of it."""
        if not self._of_ranks.waits(event):
            return False
        self._waits_to_stop = self._waits_to_stop or event
        return True

    def _part(self) -> None:
        """Go on without the other ranks, and stop alone where there is something to stop for."""
        event, self._waits_to_stop = self._waits_to_stop, None
        if event is not None:
            self._keep_error(AlarmStop(event))

    def _end(self) -> None:
        """Look at all that waits: nothing more comes. What the other ranks have not heard of stops this one no more:
        they would go on alone, and the training is over."""
        self._go_on(all_of_them=True)
        self._tell_of_samples(wait=True)
        if self._samples_after is not None:
            self._samples_after.end()
        if not self._meets():
            self._part()

    def _go_on(self, *, all_of_them: bool = False) -> None:
        norms = self._has_norms and not self._stopped()
        to = self._logged_to() if self._logs() else None
        for one in self._waiting.ready(logged_to=to, norms=norms, all_of_them=all_of_them):
            for event in self._checks.alarms(one, self._turns, rate_is_known=self._rate.known):
                self._tell(event)
            if QUANTITY in one.norms:
                total = self._checks.layout_of(one).total
                self._look_at_light(one.step, float(one.norms[QUANTITY][total][0]))

    def _look_at_light(self, step: int, rms: float) -> None:
        words = self.light.step(step, rms)
        if words:
            _LOGGER.info("%s", words)
            if self._record_light is not None:
                self._record_light(step, words)

    def _tell(self, event: AlarmEvent) -> None:
        self.events.append(event)
        _LOGGER.warning("%s", event.message)
        if not self._of_ranks.add(event):
            return  # it was heard of from another rank: acted on, and stopped for, then
        self._act(event)
        if self._stop and self._meets():
            self._waits_to_stop = self._waits_to_stop or event  # all stop where they meet
        elif self._stop:
            self._keep_error(AlarmStop(event))

    def _act(self, event: AlarmEvent) -> None:
        if self._record is not None:
            self._record(event)
        for hear in self._hearers:
            hear(event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception as error:
                self._on_event = None
                self._keep_error(error)

    def _keep_error(self, error: Exception) -> None:
        if self._keep is not None:
            self._keep(error)


def _checked_budget(budget: Any) -> float:
    if not isinstance(budget, Real) or isinstance(budget, bool) or not 0 < float(budget) < math.inf:
        raise ValueError(f"budget: expected a number > 0 of alarms per 1000 steps, got {budget!r}")
    return float(budget)


def _checked_least(least: Any) -> float:
    if not isinstance(least, Real) or isinstance(least, bool) or not 0.1 <= float(least) <= 1:
        raise ValueError(f"least_multiplier: expected a number from 0.1 to 1, got {least!r}")
    return float(least)
