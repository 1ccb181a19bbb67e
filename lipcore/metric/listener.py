"""Listeners: who is told what happens to an engine's windows, such as the record of a run."""

from __future__ import annotations

from lipcore.metric.window import Window


class Listener:
    """Base of what listens to an engine; each method is called after what its name says. An error that one raises
    stops nobody: the engine warns of it, and calls that listener no more."""

    def window_closed(self, window: Window) -> None:
        """Take a window that has closed."""

    def windows_met(self, window: Window) -> None:
        """Take the window of all ranks that this rank's of the same steps is part of."""

    def ranks_part(self) -> None:
        """Go on with this rank's own windows: those of all ranks do not come any more."""

    def state_taken(self) -> None:
        """Write down what waits: a checkpoint is being made, or the process ends."""

    def state_loaded(self, step: int) -> None:
        """Go on behind this step: a checkpoint was loaded."""

    def interrupted(self, step: int, error: BaseException) -> None:
        """Note what has ended the with block, in which so many steps were made."""

    def closed(self) -> None:
        """End: nothing more comes."""
