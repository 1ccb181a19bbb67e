"""Listeners: who is told what happens to an engine's windows, such as the record of a run."""

from __future__ import annotations

from lipcore.metric.window import Window


class Listener:
    """Base of what listens to an engine; each method is called after what its name says. An error that one raises
    stops nobody: the engine warns of it, and calls that listener no more."""

    def window_closed(self, window: Window) -> None:
        """Take a window that has closed."""

    def state_taken(self) -> None:
        """Write down what waits: a checkpoint is being made."""

    def state_loaded(self, step: int) -> None:
        """Go on behind this step: a checkpoint was loaded."""

    def closed(self) -> None:
        """End: nothing more comes."""
