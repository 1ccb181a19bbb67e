"""What a trainer's own log gets of a window."""

from __future__ import annotations

from lipcore.metric.window import Window
from lipcore.recording.numbers_of import numbers_of


def totals_of(window: Window) -> dict[str, float]:
    """Return the totals among the numbers that loggers get, without what the trainer has logged itself."""
    return {
        name: number
        for name, number in numbers_of(window).items()
        if name.endswith("/total") and not name.startswith("lipcore/logged/")
    }
