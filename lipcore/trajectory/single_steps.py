"""The numbers of single steps that a Trajectory hands to a callback."""

from __future__ import annotations

from lipcore.trajectory.building import Built
from lipcore.trajectory.step_stream import OnStep, StepStream, checked_callback


class SingleSteps:
    """The callback of a Trajectory, the stream that calls it, and what it raised."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = checked_callback(on_step)
        self.stream: StepStream | None = None  #: None while nothing is to be called
        self.error: Exception | None = None  #: what the callback raised
        self.before = 0  #: steps that earlier trackers have counted: the numbers go on over rebind()

    def start(self, built: Built) -> None:
        """Stream the steps of these trackers from now on, if there is a callback."""
        self.stream = None
        if self.on_step is None:
            return
        tracker, places = built.first, list(built.first.places.names)
        tables = {stage: of_stage.table for stage, of_stage in built.of_gradients.items()}
        self.stream = StepStream(
            self.on_step, places, tracker.table, tables, built.align, self._failed, first=self.before + 1
        )

    def flush(self) -> None:
        """Hand over all steps so far. Waits for a device."""
        if self.stream is not None:
            self.stream.flush()

    def stop(self) -> None:
        """Hand over what is left and call nothing any more."""
        self.flush()
        self.stream = self.on_step = None

    def take_error(self) -> Exception | None:
        """Return, once, what the callback raised."""
        error, self.error = self.error, None
        return error

    def _failed(self, error: Exception) -> None:
        self.error, self.stream, self.on_step = error, None, None
