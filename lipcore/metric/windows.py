"""The windows of a run: where the open one began, when it is over, and those that have closed."""

from __future__ import annotations

from collections import deque

from lipcore.metric.results import History, Window
from lipcore.models.arguments import check_count


class Windows:
    """Counter of steps and windows, and keeper of the closed ones.

    Args:
        steps: steps in a window; None: it is closed only by hand.
        blocks: with more than one, windows slide by steps / blocks.
        limit: how many closed windows are kept.
        bytes_limit: for how many bytes of them.

    Raises:
        TypeError, ValueError: one of them is no count, or the blocks do not fit the steps.
    """

    def __init__(self, steps: int | None, blocks: int, limit: int, bytes_limit: int) -> None:
        if steps is not None:
            check_count("window_steps", steps)
        check_count("window_blocks", blocks)
        check_count("history_limit", limit)
        check_count("history_bytes", bytes_limit)
        if blocks > 1 and (steps is None or steps % blocks):
            raise ValueError(f"window_blocks: {blocks} blocks of equal length do not make {steps} steps")
        self.steps, self.blocks = steps, blocks
        self.history = History(maxlen=limit, bytes_limit=bytes_limit)
        self._unread = History(maxlen=limit, bytes_limit=bytes_limit)
        self.step = 0  #: steps counted, those of a loaded state among them
        self.number = 0  #: how many windows have closed
        self.final: Window | None = None  #: the open window as it was when the recording ended
        self._starts: deque[tuple[int, int]] = deque([(0, 0)], maxlen=blocks)  # step, unrecorded of each block

    @property
    def begin(self) -> int:
        """Steps before the open window."""
        return self._starts[0][0]

    @property
    def unrecorded_before(self) -> int:
        """Forward passes that had brought no record when the open window began."""
        return self._starts[0][1]

    @property
    def block_steps(self) -> int:
        """Steps of the open block, which is the whole window unless windows slide."""
        return self.step - self._starts[-1][0]

    @property
    def is_over(self) -> bool:
        """Answer to whether the open window has all its steps."""
        return self.steps is not None and self.block_steps >= self.steps // self.blocks

    @property
    def rule(self) -> str:
        """The words for when a window closes."""
        if self.steps is None:
            return "window open since the start"
        of = f" of the last {self.steps} steps" if self.blocks > 1 else ""
        return f"window{of} closed every {self.steps // self.blocks} steps"

    def close(self, window: Window, unrecorded: int) -> None:
        """Keep a closed window; the next one begins with the next step."""
        self.final = None
        self.history.append(window)
        self._unread.append(window)
        self.number += 1
        self._starts.append((self.step, unrecorded))

    def pop(self) -> Window | None:
        """Return the oldest closed window that was not popped yet; None when there is none."""
        return self._unread.popleft() if self._unread else None

    def mark_read(self, window: Window) -> None:
        """Keep pop() from returning this window."""
        self._unread.remove(window)

    def state(self) -> dict[str, object]:
        """Return the counts that a saved state holds."""
        return {"step": self.step, "starts": [list(start) for start in self._starts], "windows": self.number}

    def load(self, step: int, number: int, starts: list[int]) -> None:
        """Go on from the counts of a saved state, without the windows that have steps behind it; `starts`: the step
        before every block of the open window."""
        self.history.forget(step)
        self._unread.forget(step)
        self.step, self.number = step, number
        self._starts.clear()
        self._starts.extend((start, 0) for start in starts)
