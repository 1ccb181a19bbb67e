"""When numbers of single steps are handed on."""

from __future__ import annotations

import time

#: Less than this between two blocks would cost more than it tells sooner.
PROMPT = 0.01


class Pace:
    """Rule of when what waits is handed on: so many steps together, or before that, where it is to be prompt, whatever
    there is after `seconds`. So a step of training that takes longer than that is handed on at once, and short ones
    come in blocks.

    Args:
        block: as many steps are handed on at once at most.
        seconds: as long they wait at most; None: until there is a block.
    """

    def __init__(self, block: int, seconds: float | None = None) -> None:
        self.block, self._seconds = block, seconds
        self._soon = 0  # times that what waits is handed on, however little it is
        self._last = time.monotonic()

    def hurry(self) -> None:
        """Have what waits handed on at the next two occasions: something has happened, and there may be no third."""
        self._soon = 2

    @property
    def hurries(self) -> bool:
        """True where what waits is handed on at the next occasion."""
        return self._soon > 0

    def is_due(self, waiting: int) -> bool:
        """Return whether so many steps are to be handed on now; if so, the next ones wait anew."""
        early = waiting < self.block
        if early and waiting and self._soon:
            self._soon -= 1
            early = False
        if early and (self._seconds is None or not waiting or time.monotonic() - self._last < self._seconds):
            return False
        self._last = time.monotonic()
        return True
