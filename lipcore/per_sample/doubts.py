"""Why norms of a window are not proved to be single samples' or were taken back, and how many."""

from __future__ import annotations

from collections import Counter, deque


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
