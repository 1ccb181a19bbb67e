"""Why norms of a window are not proved to be single samples' or were taken back, and how many."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.metric.state import is_count


def doubt_of(records: Sequence[LayerRecord], unknown_scale: str, note: str) -> str:
    """Return why numbers of these backward passes are not known, not proved, or not of all parameters; "" where they
    are.

    Args:
        unknown_scale: why what the loss was multiplied with is not known.
        note: of which parameters they are; "" where they are of all.
    """
    missing = next(filter(None, (record.broken or record.hidden for record in records)), "")
    unproved = unknown_scale or next(filter(None, (record.unproved for record in records)), "")
    return "; ".join(filter(None, (missing, unproved and f"not proved: {unproved}", note)))


class Doubts:
    """Reasons with their numbers of backward passes or samples, of an open block and at most `blocks` - 1 closed
    ones."""

    def __init__(self, blocks: int) -> None:
        self._blocks: deque[Counter[str]] = deque([Counter()], maxlen=blocks)

    def add(self, reason: str, count: int = 1) -> None:
        """Count backward passes that were not proved, or samples that were taken back."""
        self._blocks[-1][reason] += count

    def counts(self) -> dict[str, int]:
        """Return everything in the window."""
        total: Counter[str] = Counter()
        for block in self._blocks:
            total.update(block)
        return dict(total)

    def advance(self) -> None:
        """Close the open block; the oldest one falls out."""
        self._blocks.append(Counter())

    def reset(self) -> None:
        """Start anew."""
        self._blocks.clear()
        self.advance()

    def merge(self, other: Doubts) -> None:
        """Add those of another window to the open block."""
        self._blocks[-1].update(other.counts())

    def state(self) -> list[dict[str, int]]:
        """Return the reasons of each block, the open one last, as a checkpoint holds them."""
        return [dict(block) for block in self._blocks]

    def load(self, state: Any) -> None:
        """Go on from :meth:`state`, [] for none; ValueError where it is no such thing, and nothing has changed."""
        self._blocks = self.checked(state)

    def checked(self, state: Any) -> deque[Counter[str]]:
        """Return the blocks of a state; ValueError where it is none."""
        fits = isinstance(state, list) and len(state) <= (self._blocks.maxlen or 1)
        if not fits or not all(isinstance(block, dict) and all(map(is_count, block.values())) for block in state):
            raise ValueError(f"doubts: expected reasons with counts, by block, got {state!r:.80}")
        return deque([Counter(block) for block in state] or [Counter()], maxlen=self._blocks.maxlen)


def added_doubts(states: Sequence[Sequence[dict[str, int]]]) -> list[dict[str, int]]:
    """Return the state of the doubts of several ranks together; the last blocks of all are the open ones."""
    total: list[Counter[str]] = [Counter() for _ in range(max(map(len, states), default=0))]
    for state in states:
        for into, block in zip(reversed(total), reversed(state), strict=False):
            into.update(block)
    return [dict(block) for block in total]
