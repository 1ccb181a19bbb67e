"""What a Monitor with alarms does beside an engine: looks at steps, writes snapshots, and stops ranks together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lipcore.alarms.alarms import Alarms
from lipcore.alarms.attach import AlarmsListener, norms_of, trajectory_of
from lipcore.alarms.event import AlarmStop
from lipcore.alarms.samples import SamplesAfter
from lipcore.capture.training_pass import in_backward
from lipcore.distributed.appointment import AHEAD, Appointment
from lipcore.distributed.group import Group
from lipcore.metric.optimizers import updating
from lipcore.models.capturing import is_captured_here
from lipcore.models.ranks import rank
from lipcore.monitor.recorded import Recorded
from lipcore.recording.snapshots import Snapshots

_STOPS = "an alarm that is to stop all ranks"


class Alarmed(Recorded):
    """The part of a Monitor that has every step looked at by :class:`lipcore.alarms.Alarms`, where it has them."""

    _meets: bool  # log() merges the windows of all ranks
    _parted: bool  # it has, and does so no more
    _appointment: Appointment  # of ranks that merge no windows
    _holds_stops: bool  # the loop makes calls in which the ranks can stop together
    _snapshots: Snapshots | None  # of alarms that ask for them
    _samples_after: SamplesAfter | None  # likewise
    _waits_to_begin: bool
    _set_by_hand: bool  # parameters were loaded, or announced to change, since the last step

    def _attach_alarms(self, alarms: Alarms) -> None:
        """Have single steps and what is logged looked at from now on."""
        trajectory = trajectory_of(self.metrics.values())
        optimizers = updating(self._optimizers)
        has_norms, logs = trajectory is not None, lambda: self._logged.begun
        given: dict[str, Any] = {"has_norms": has_norms, "meets": self._meets_ranks}
        given["logged_to"] = lambda: self._logged.complete
        if trajectory is not None:
            given["turns"] = lambda: trajectory.movement_turns  # others after a rebind()
            given["stopped"] = lambda: bool(trajectory.off)
        alarms._begin(optimizers, self._failures.keep, logs, **given)
        if trajectory is not None:
            trajectory.listen(alarms._norms, prompt=True)
            if "unexplained_movement" in alarms.signals and not trajectory.checks_movement:
                self._failures.warn(f"alarms: unexplained_movement checks no parameter: {trajectory.why_unchecked}")
            if "rms_t" in alarms.signals and trajectory.why_no_rms_t:
                self._failures.warn(f"alarms: rms_t never alarms: {trajectory.why_no_rms_t}")
        self._appointment, self._holds_stops = Appointment(self._global.partners), False
        self._failures.holds = self._holds
        self._logged.listen(alarms._logged, prompt=True)
        self._listeners.append(AlarmsListener(alarms, trajectory, self._go_behind))
        if alarms.snapshot is not None:
            parts = (rank(), self.model, self._optimizers, self._scaler)
            self._snapshots = Snapshots(alarms.snapshot, *parts, self._failures.warn)
            alarms._hearers.append(self._snapshots.hear)
            self._listeners.append(self._snapshots)
            self._failures.at_call = self._write_snapshot
        norms = norms_of(self.metrics.values())
        if alarms.per_sample is not None and norms is not None:
            norms.rest()
            failed = functools.partial(self._stop_metric, norms)
            self._samples_after = SamplesAfter(alarms.per_sample, norms, alarms._tell_samples, failed)
            norms.listen(self._samples_after)
            alarms._name_samples(self._samples_after)

    def _after_alarms(self, *, begins: bool = False) -> None:
        """Do what alarms have asked for between two steps: at the end of one, or, where that lay inside of a backward
        pass, when the optimizer `begins` the next."""
        self._write_snapshot(begins=begins)
        if self._samples_after is None or (begins and not self._waits_to_begin):
            return
        self._waits_to_begin = in_backward() != -1 or is_captured_here()
        if not self._waits_to_begin:
            self._samples_after.between(self._windows.step, self._windows.step + begins)

    @property
    def _between_steps(self) -> bool:
        """True while all parameters are as of the end of the last step that was counted."""
        return self._clock.between_steps and self._all_counted

    def _write_snapshot(self, *, begins: bool = False, ends: bool = False) -> None:
        """Write the files of an alarm that wait for a place between two steps, outside of the forward and backward
        passes; at the end of all wherever that is. Parameters that were loaded since the last step may be an average
        that is swapped in: what the training goes on from is there when the optimizer `begins` a step."""
        snapshots = self._snapshots
        if snapshots is None or not snapshots.due or in_backward() != -1 or is_captured_here():
            return
        amid = not self._between_steps or (self._set_by_hand and not begins) or not snapshots.all_spread
        if amid and not (self._closed or ends):
            return
        try:
            if not self._closed:
                self._write_all()
        except Exception as error:  # of a device, say, which the user's next call meets too
            self._failures.warn(f"lipcore could not write down all steps before a snapshot: {error}")
        record = None if self._recorder is None else self._recorder.record
        snapshots.write(self._windows.step, record, amid_step=amid)

    # ---- with other ranks

    def _stop_together(self, *, merges: bool) -> None:
        """Let an alarm that is to stop this rank stop all of them, in a call that all of them make: in this very one,
        where it `merges` windows, for which the others would wait; else in one that the ranks appoint, in which they
        meet for that alone. Called in every :meth:`log` and :meth:`log_batch`, before errors are raised."""
        alarms = self.alarms
        if alarms is None or not alarms._stop or self._closed:
            return
        self._holds_stops = True
        merges = merges and self._meets and self._global.waits
        looks = not merges and self._appointment.looks(self._windows.step)
        if not looks and self._failures.kept(AlarmStop) is None:
            return
        group = self._global.partners.find()
        if group is None:
            return
        if looks and self._is_appointed(group):
            self._meet_to_stop(group)
        elif self._let_wait() and not merges:
            self._appoint(group)

    def _let_wait(self) -> bool:
        """Let a stop that was kept for this rank alone wait for all of them, which raise the same one; return whether
        there was one that they have not heard of."""
        stop = self._failures.kept(AlarmStop)
        if stop is None or self.alarms is None or not self.alarms._wait_to_stop(stop.event):
            return False
        self._failures.drop(AlarmStop)
        return True

    def _is_appointed(self, group: Group) -> bool:
        """Return whether the ranks meet in this call; not asked where they do so elsewhere."""
        if self._meets_ranks() and not self._appointment.asked:
            return False
        try:
            due = self._appointment.is_due(group, self._windows.step)
        except RuntimeError:  # the store is gone, and the rank that had it
            return False
        if self._appointment.is_called_off:
            self._stop_none(group, "Another rank has looked for this one in vain, and has called it off")
        return due

    def _appoint(self, group: Group) -> None:
        with suppress(RuntimeError):  # likewise
            self._appointment.ask(group, self._windows.step)

    def _meet_to_stop(self, group: Group) -> None:
        """Tell the other ranks of the alarms of this one, and hear of theirs; all stop, or none does."""
        header = {"version": 1, "call": _STOPS, "said": self._said()}
        try:
            found = self._global.partners.meet(group, _STOPS, self._windows.step, header)
        except RuntimeError as error:
            self._stop_none(group, str(error))
            return
        for number, each in zip(group.ranks, found, strict=True):
            if each["call"] != _STOPS:  # all have the same headers, and so none stops
                self._stop_none(group, f"Rank {number} is at {each['call']} at step {self._windows.step}")
                return
        self._appointment.keep()
        self._heard([each["said"] for each in found])

    def _stop_none(self, group: Group, why: str) -> None:
        """Go on, with a warning, where the ranks do not meet to stop together."""
        assert self.alarms is not None
        self.alarms._waits_to_stop = None
        with suppress(RuntimeError):
            self._appointment.call_off(group)
        self._failures.warn(
            "lipcore could not stop all ranks for an alarm, and so stops none: the others would wait for this one. "
            f"{why}. Call monitor.log() or monitor.log_batch() on every rank at the same steps. Where they do, one "
            f"rank's loop is more than {AHEAD} steps ahead of another's, and of its own device: have it wait for that "
            f"every {AHEAD // 2} steps (loss.item(), torch.cuda.synchronize()), or merge windows: "
            "monitor.global_window() at the same steps; or pass group=None to a Monitor that is to stop its rank alone"
        )

    def _holds(self, error: Exception) -> bool:
        """Return whether an error that was kept waits for a call in which all ranks raise it."""
        if not isinstance(error, AlarmStop) or self.alarms is None or not self._holds_stops:
            return False
        return self.alarms._of_ranks.waits(error.event) and self._global.partners.find() is not None

    def _go_behind(self, step: int) -> None:
        """Go on behind this step: a checkpoint was loaded, and steps whose alarms were to stop are made anew."""
        self._appointment.forget()
        stop = self._failures.kept(AlarmStop)
        if stop is not None and stop.event.step > step:
            self._failures.drop(AlarmStop)

    def _said(self) -> Any:
        return None if self.alarms is None else self.alarms._said()

    def _heard(self, said: Sequence[Any]) -> None:
        if self.alarms is not None:
            group = self._global.partners.find()
            if group is not None and self._appointment.asked:  # before they met here
                with suppress(RuntimeError):
                    self._appointment.call_off(group)
            self._let_wait()
            ranks = group.ranks if group is not None else range(len(said))
            self.alarms._heard(dict(zip(ranks, said, strict=True)))

    def _meets_ranks(self) -> bool:
        """Return whether the loop will meet other ranks: where log() does so, or it has merged windows before. A
        loop that has not called log() when its second window has closed is taken not to."""
        logs = self._logged.begun or (not self._closed and self._global.number_waiting < 2)
        meets = (self._meets and logs) or (bool(self._global.history) and not self._parted)
        meets = (meets and not self._global.is_given_up) or self._appointment.asked
        return meets and self._global.partners.find() is not None

    # ---- the clock

    def _moved_by_hand(self) -> None:
        super()._moved_by_hand()
        self._set_by_hand = True

    def _note_step(self) -> None:
        super()._note_step()
        self._set_by_hand = False
        if self.alarms is not None:
            self.alarms._note_step()
        if self._flight is not None:
            self._flight.note_step()

    def _after_step(self) -> None:
        stopwatch = self._stopwatch
        if stopwatch is not None:
            stopwatch.begin()
        if self.alarms is not None:
            self.alarms._begin_step(self._windows.step + 1)
            try:
                self._logged.step(self._windows.step + 1)
            except Exception as error:  # for the user's next call, as log() would raise it
                self._failures.keep(error)
        if self._flight is not None:
            self._flight.begin_step(self._windows.step + 1)
        super()._after_step()
        if stopwatch is not None:
            stopwatch.end()
        self._after_alarms()

    def _step_begins(self) -> None:
        super()._step_begins()
        if self._flight is not None:
            self._flight.optimizer_begins()
        self._after_alarms(begins=True)

    def _shut(self) -> None:
        super()._shut()
        self._write_snapshot()
        stop = self._failures.kept(AlarmStop)
        if stop is not None and self._holds(stop):  # the training is over, and the others would wait for this rank
            self._failures.drop(AlarmStop)
