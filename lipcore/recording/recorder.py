"""What a run's record and its writers are given as training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.samples import SamplesAfterAlarm
from lipcore.metric.listener import Listener
from lipcore.metric.values import Level
from lipcore.metric.window import Window
from lipcore.recording.batches import Batch
from lipcore.recording.endings import told
from lipcore.recording.record import RunRecord
from lipcore.report.alarms_told import LIGHT, SAMPLES
from lipcore.report.left_out import NOT_FINITE
from lipcore.report.source import StepTime
from lipcore.trajectory.step_stream import StepArrays

_TOTAL = ["total"]


class Recorder(Listener):
    """Listener that writes windows, single steps and logged numbers to a record.

    Args:
        record: written to from the first numbers on.
        warn: told, once, that nothing is recorded any more, and why.
        step: steps that have been made before.
    """

    def __init__(self, record: RunRecord, warn: Callable[[str], None], step: int = 0) -> None:
        self.record = record
        self._warn, self._step = warn, step
        self.on_alarm: Callable[[], None] = _nothing  #: told of an alarm, whose steps are to be in the file soon
        self.facts: Callable[[], Mapping[str, Any]] = dict  #: what is known of the run when it begins or goes on
        self._begun = self._told = self._told_behind = False
        self._measured = np.zeros(0, bool)  # parameters that have had a norm
        self._older, self._left = "", 0

    def steps(self, first: int, arrays: StepArrays) -> None:
        """Add a Trajectory's numbers of single steps."""
        self._begin()
        named = {f"trajectory/{name}": array for name, array in arrays.items()}
        self.record.add_steps(first, named, arrays.places, arrays.levels)
        self._left_out(first, arrays)
        details = {f"flight/tensor_{name}": array for name, array in arrays.items()}
        self.record.add_details(first, details, arrays.places, arrays.levels)

    def _left_out(self, first: int, arrays: StepArrays) -> None:
        """Add the steps in which a parameter was not finite, by group: the group's numbers are of its others."""
        if not arrays.groups:
            return
        norms = arrays["update_norm"][:, : len(arrays.groups)]
        finite = np.isfinite(norms)
        if len(self._measured) != len(arrays.groups):
            self._measured = np.zeros(len(arrays.groups), bool)
        self._measured |= finite.any(0)
        lost = ~finite & self._measured  # else nobody measures it
        rows = np.flatnonzero(lost.any(1))
        if not len(rows):
            return
        names = [*dict.fromkeys(arrays.groups), "total"]
        columns = [np.array([group == name for group in arrays.groups]) for name in names[:-1]]
        counts = np.stack([*(lost[:, column].sum(1) for column in columns), lost.sum(1)], axis=1)
        levels: list[Level] = [*["group"] * len(columns), "total"]  # type: ignore[list-item]
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            self.record.add_steps(first + int(run[0]), {NOT_FINITE: counts[run].astype(np.float64)}, names, levels)

    def logged(self, first: int, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Add what the loop has logged, [steps] by name."""
        self._begin()
        columns = {f"logged/{name}": array[:, None] for name, array in arrays.items()}
        self.record.add_steps(first, columns, _TOTAL, ["total"], measured=True)

    def alarm(self, event: AlarmEvent) -> None:
        """Add an alarm to what has happened."""
        self._begin()
        data = {
            "signal": event.signal,
            "place": event.place,
            "score": event.score if math.isfinite(event.score) else None,
        }
        data |= {} if event.rank is None else {"rank": event.rank}
        self.record.add_event(event.step, "alarm", event.message, data)
        self.on_alarm()

    def light(self, step: int, words: str) -> None:
        """Add that the warning light of the alarms has gone on."""
        self._begin()
        self.record.add_event(step, LIGHT, words)

    def samples(self, found: SamplesAfterAlarm) -> None:
        """Add the samples with the largest gradient norms after an alarm."""
        self._begin()
        largest = [[one.step, one.row, one.id, one.norm if math.isfinite(one.norm) else None] for one in found.largest]
        data = {"alarm": found.alarm, "first": found.first, "count": found.count, "largest": largest}
        data |= {} if found.told_by is None else {"told_by": found.told_by}
        data |= {"doubt": found.doubt} if found.doubt else {}
        self.record.add_event(found.last, SAMPLES, found.message, data)

    def batches(self, batches: Sequence[Batch]) -> None:
        """Add the samples of single steps."""
        self._begin()
        self.record.add_batches(batches)

    def rates(self, first: int, rates: NDArray[np.float64], groups: Sequence[str]) -> None:
        """Add the learning rates of the optimizers' groups, [steps, groups]."""
        self._begin()
        self.record.add_steps(first, {"optimizer/group_lr": rates}, groups, ["group"] * len(groups))

    def scales(self, first: int, scales: NDArray[np.float64]) -> None:
        """Add the scale of a GradScaler, [steps]."""
        self._begin()
        self.record.add_steps(first, {"optimizer/loss_scale": scales[:, None]}, _TOTAL, ["total"])

    def step_time(self, time: StepTime) -> None:
        """Add the time of some steps."""
        self._begin()
        self.record.add_step_time(time)

    def taken_back(self, after: int, reason: str) -> None:
        """Forget the norms of the samples of later steps."""
        self.record.forget_norms(after)
        if self._begun:
            text = f"the gradient norms of single samples since step {after} were taken back: {reason}"
            self.record.add_event(after, "taken back", text)

    def ended(self, step: int, kind: str, text: str, facts: Mapping[str, Any]) -> None:
        """Add what has ended the run, or may have, after so many steps."""
        self._begin()
        self.record.add_event(step, kind, text, facts)

    def interrupted(self, step: int, error: BaseException) -> None:
        if not isinstance(error, (SystemExit, GeneratorExit)):
            self.ended(step, "exception", *told(error))

    def window_closed(self, window: Window) -> None:
        self._begin()
        self.record.add_window(window)

    def windows_met(self, window: Window) -> None:
        self.record.add_window(window)  # in the place of this rank's

    def state_taken(self) -> None:
        self.record.flush()
        self._tell()

    def state_loaded(self, step: int) -> None:
        self._step = step
        if self._begun:
            self.record.begin(step, self.facts())

    def closed(self) -> None:
        self.record.close()
        self._tell()
        if self.record.behind:
            self._warn(f"{self.record.behind}; copy it there")

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.record.begin(self._step, self.facts())
        self._tell()

    def _tell(self) -> None:
        if self.record.older != self._older:
            self._older = self.record.older
            self._warn(
                f"run: {self.record.path} had the record of an older run, and this one begins at its first step, so "
                f"that file is {self._older} now. To go on from a checkpoint, call monitor.load_state_dict() before "
                "the first step; torch's get_state_dict(model, optimizer) makes one to fill in the state of a new "
                "optimizer, so call it before the Monitor is made too. For a run of its own choose another folder"
            )
        for text in self.record.left[self._left :]:
            self._left += 1
            self._warn(f"run: {self.record.path.parent}: {text}")
        if bool(self.record.failed) != self._told:
            self._told = not self._told
            if self._told:
                self._warn(f"the run is no longer recorded, and the training goes on: {self.record.failed}")
            else:
                self._warn("the run is recorded again; an event says behind which step some are missing")
        if self.record.behind and not self._told_behind:
            self._told_behind = True
            self._warn(f"{self.record.behind}; the next checkpoint, or the end, tries again")


def _nothing() -> None:
    """Do nothing."""
