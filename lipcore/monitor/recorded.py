"""What a Monitor with a record does beside an engine: it writes down single steps, windows, and what ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

from lipcore.alarms.alarms import Alarms
from lipcore.alarms.event import AlarmStop
from lipcore.metric.engine import Engine
from lipcore.metric.optimizers import updating
from lipcore.models.names import parameter_names
from lipcore.models.ranks import rank, world_size
from lipcore.monitor.logged import Logged
from lipcore.per_sample.grad_norms import PerSampleGradNorms
from lipcore.recording.endings import Endings, EndKind
from lipcore.recording.flight import Flight
from lipcore.recording.recorder import Recorder
from lipcore.recording.stopwatch import Stopwatch
from lipcore.report.parts import SINGLE_STEPS
from lipcore.trajectory.metric import Trajectory


class Recorded(Engine):
    """The part of a Monitor that hands what is seen to the record of :func:`lipcore.watch`, where there is one."""

    alarms: Alarms | None
    _logged: Logged
    _flight: Flight | None  # of a record
    _stopwatch: Stopwatch | None  # of one too
    _recorder: Recorder | None  # likewise

    def _attach_recorder(self, recorder: Recorder) -> None:
        """Have windows, single steps and what is logged written down from now on; of :func:`lipcore.watch`."""
        self._logged.listen(recorder.logged)
        for metric in self.metrics.values():
            if isinstance(metric, Trajectory):
                metric.listen(recorder.steps)
        here = ref(self)

        def ended(kind: EndKind, text: str, facts: dict[str, Any]) -> None:
            monitor = here()
            if monitor is not None:
                monitor._write_down(recorder, kind, text, facts)

        endings, model = Endings(ended), self.model
        flight = Flight(
            updating(self._optimizers),
            lambda: parameter_names(model),
            recorder.batches,
            recorder.rates,
            recorder.taken_back,
            endings.begin,
            scaler=self._scaler,
            on_scales=recorder.scales,
        )
        for metric in self.metrics.values():
            if isinstance(metric, PerSampleGradNorms):
                metric.listen(flight)
        self._flight, self._recorder = flight, recorder

        def facts() -> dict[str, Any]:
            monitor = here()
            return {} if monitor is None else {SINGLE_STEPS: monitor._whose_steps()}

        recorder.facts = facts
        self._stopwatch = Stopwatch(recorder.step_time)
        # The last closes the file, after what it is given.
        self._listeners += [endings, flight, self._stopwatch, recorder]
        if self.alarms is not None:
            self.alarms._write_to(recorder.alarm, recorder.light, recorder.samples)
            recorder.on_alarm = self._hurry

        def stops(error: Exception) -> None:
            monitor = here()
            if monitor is not None and isinstance(error, AlarmStop) and not monitor._closed:
                monitor._write_all()
                monitor._failures.drop(AlarmStop)  # of a step that waited: one stops the loop

        self._failures.before_raise = stops

    def _whose_steps(self) -> dict[str, Any]:
        """Return what the single steps of this process cover, for who reads the record."""
        scope = self._global.scope(self.model, self.metrics.values())
        place = self._global.place
        found: dict[str, Any] = {"scope": scope, "rank": rank(), "ranks": 1 if place.apart else place.ranks}
        stage = next((metric.prefix for metric in self.metrics.values()), "") if world_size() > 1 else ""
        return found | ({"stage": stage} if stage else {})

    def _hurry(self) -> None:
        """Have the steps around an alarm written soon: it may be the last that there is to see."""
        self._logged.hurry()
        if self._flight is not None:
            self._flight.hurry()
        for metric in self.metrics.values():
            if isinstance(metric, Trajectory):
                metric.hurry()

    def _write_down(self, recorder: Recorder, kind: EndKind, text: str, facts: Mapping[str, Any]) -> None:
        """Write all that waits to the file, and what ends the run, which may yet go on. Waits for a device."""
        self._write_all()
        if self.alarms is not None and kind != "SIGTERM":  # after which the training may go on
            self.alarms._end()
        recorder.ended(self._windows.step, kind, text, facts)
        recorder.record.flush()
        if kind != "SIGTERM":  # which may come amid a pass, and in another thread
            self._write_snapshot(ends=True)

    def _write_snapshot(self, *, begins: bool = False, ends: bool = False) -> None:
        """Write the files of an alarm that wait, where there are alarms that ask for them."""

    def _write_all(self) -> None:
        """Write all that waits to the file. Waits for a device."""
        if not self._failures.all_stopped:
            for metric in self.metrics.values():
                metric.flush()
        self._tell(lambda listener: listener.state_taken())

    def _after_backward(self) -> None:
        super()._after_backward()
        if self._flight is not None:
            self._flight.backward_ends()

    def _after_skipped_step(self) -> None:
        super()._after_skipped_step()
        if self._flight is not None:
            self._flight.skip_step()

    def _warn_of_record(self, message: str) -> None:
        """Warn, as of everything that happens in a hook."""
        self._failures.warn(message)
