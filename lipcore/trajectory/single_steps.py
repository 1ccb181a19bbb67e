"""The numbers of single steps that a Trajectory hands to callbacks: the user's, and those of a record."""

from __future__ import annotations

from lipcore.trajectory.building import Built
from lipcore.trajectory.step_stream import OnStep, StepStream, checked_callback


class SingleSteps:
    """The callbacks of a Trajectory, the stream that calls them, and what the user's raised."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = checked_callback(on_step)
        self.listeners: list[OnStep] = []  #: called before the user's
        self.stream: StepStream | None = None  #: None while nothing is to be called
        self.error: Exception | None = None  #: what the callback raised
        self.before = 0  #: steps that earlier trackers have counted: the numbers go on over rebind()

    def start(self, built: Built) -> None:
        """Stream the steps of these trackers from now on, if there is a callback."""
        self.stream = None
        calls = [*self.listeners, *([] if self.on_step is None else [self.on_step])]
        if not calls:
            return
        tracker = built.first
        tables = {stage: of_stage.table for stage, of_stage in built.of_gradients.items()}
        self.stream = StepStream(
            calls, tracker.places, tracker.table, tables, built.align, self._failed, first=self.before + 1
        )

    def flush(self) -> None:
        """Hand over all steps so far. Waits for a device."""
        if self.stream is not None:
            self.stream.flush()

    def stop(self) -> None:
        """Hand over what is left and call nothing any more."""
        self.flush()
        self.stream = self.on_step = None
        self.listeners = []

    def take_error(self) -> Exception | None:
        """Return, once, what the callback raised."""
        error, self.error = self.error, None
        return error

    def _failed(self, call: OnStep, error: Exception) -> None:
        if call in self.listeners:
            self.listeners.remove(call)
        else:
            self.error, self.on_step = error, None
        if not self.listeners and self.on_step is None:
            self.stream = None
