"""How often something that makes a pass dearer may be done: by its measured share of the time."""

from __future__ import annotations

import statistics
import time
from collections import deque

from lipcore.models.ranks import world_size

_LEARNING = 8  # passes at the start: every second one is dear, so that both kinds are timed side by side
_TIMES = 15  # last durations of each kind; an odd number has a median that was measured
_MOST = 1 << 16
#: Under a process group ranks must do the same, and their clocks differ: so often that 2.5 times a step is 1 %.
_OF_A_GROUP = 256


class CostShare:
    """The schedule of a costly thing that is done in some passes. Told when passes begin, it compares the times from
    pass to pass, with and without, and doubles the interval until the excess is at most `share` of the time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._number = -1
        self._began = 0.0
        self._dear: bool | None = None  # the pass under way; None: its time says nothing
        self._times: dict[bool, deque[float]] = {kind: deque(maxlen=_TIMES) for kind in (False, True)}
        self._interval = 0  # 0: still learning
        self._next = 0

    def begin(self, number: int) -> None:
        """Note that the pass of this number begins. Numbers may be left out: the time since the last pass is then not
        used."""
        now = time.perf_counter()
        if self._dear is not None and number == self._number + 1:
            self._times[self._dear].append(now - self._began)
        self._began, self._number = now, number
        self._dear = False if number else None  # the first warms up

    @property
    def is_due(self) -> bool:
        """True where the costly thing may be done in this pass."""
        if world_size() > 1:
            return self._number % _OF_A_GROUP == 0
        if self._number < _LEARNING:
            return self._number % 2 == 0
        if not self._interval:
            self._plan(debt=4)
        return self._number >= self._next

    def done(self) -> None:
        """Note that the costly thing is done in this pass."""
        if self._dear is not None:
            self._dear = True
        if self._number > _LEARNING:
            self._plan()

    def disturbed(self) -> None:
        """Note that something else makes this pass costly, so that its time is not used."""
        self._dear = None

    def _plan(self, debt: int = 1) -> None:
        """Choose the interval, paying off first what the passes at the start took too much."""
        if not (self._times[True] and self._times[False]):
            self._interval = max(self._interval, 1)
        else:
            dear, plain = (statistics.median(self._times[kind]) for kind in (True, False))
            wanted = (dear - plain) / (self._share * plain)
            self._interval = 1
            while self._interval < min(wanted, _MOST):
                self._interval *= 2
        self._next = self._number + self._interval * (debt if self._interval > 1 else 1)

    @property
    def rule(self) -> str:
        """Words for how often the costly thing is done."""
        if world_size() > 1:
            return f"every {_OF_A_GROUP} micro-batches"
        if not self._interval:
            return f"so that it takes at most {self._share:.1%} of the time"
        return f"every {self._interval} micro-batches" if self._interval > 1 else "every micro-batch"
