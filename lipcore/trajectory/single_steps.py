"""The numbers of single steps that a Trajectory hands to callbacks: the user's, and those of a record."""

from __future__ import annotations

from lipcore.metric.pace import PROMPT
from lipcore.trajectory.building import Built
from lipcore.trajectory.step_stream import OnStep, StepStream, checked_callback


class SingleSteps:
    """The callbacks of a Trajectory, the streams that call them, and what the user's raised."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = checked_callback(on_step)
        self.listeners: list[OnStep] = []  #: called before the user's
        self.prompt: list[OnStep] = []  #: called as soon as it costs little
        self._streams: list[StepStream] = []  # none while nothing is to be called
        self.error: Exception | None = None  #: what the callback raised
        self.before = 0  #: steps that earlier trackers have counted: the numbers go on over rebind()

    def start(self, built: Built) -> None:
        """Stream the steps of these trackers from now on, if there is a callback."""
        self._streams = []
        blocks = [*self.listeners, *([] if self.on_step is None else [self.on_step])]
        first = built.first
        groups = [one.group for one in first.watched] if "tensor" in first.places.levels else []
        for calls, seconds in ((blocks, None), (self.prompt, PROMPT)):
            if calls:
                stream = StepStream(
                    calls, first.places, first.table, built.step_rings, built.align, self._failed,
                    first=self.before + 1, seconds=seconds, groups=groups,
                )  # fmt: skip
                self._streams.append(stream)

    def step(self) -> None:
        """Count a step, and hand over what is due."""
        for stream in self._streams:
            stream.step()

    def hurry(self) -> None:
        """Hand over what waits at the next steps, however little it is."""
        for stream in self._streams:
            stream.hurry()

    def skip(self) -> None:
        """Pass over the steps that wait."""
        for stream in self._streams:
            stream.skip()

    def flush(self) -> None:
        """Hand over all steps so far. Waits for a device."""
        for stream in self._streams:
            stream.flush()

    def stop(self) -> None:
        """Hand over what is left and call nothing any more."""
        self.flush()
        self.on_step = None
        self._streams, self.listeners, self.prompt = [], [], []

    def take_error(self) -> Exception | None:
        """Return, once, what the callback raised."""
        error, self.error = self.error, None
        return error

    def _failed(self, call: OnStep, error: Exception) -> None:
        for listeners in (self.listeners, self.prompt):
            if call in listeners:
                listeners.remove(call)
                return
        self.error, self.on_step = error, None
