"""What a failed proof takes back: everything since the last good one."""

from __future__ import annotations

from lipcore.metric.blocks import BlockWindow
from lipcore.metric.handed_out import HandedOut
from lipcore.per_sample.doubts import Doubts
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.open_step import OpenStep
from lipcore.per_sample.scores.score_columns import Scores


class Unproved:
    """The samples of a window, its noise scale and scores that no good proof has come after yet.

    There are proofs of tapped passes and proofs of passes that were served (batches of one, read from the gradients).
    Each says nothing about passes of the other kind, so a mark is made where passes of neither kind wait. Batches of
    one that are tapped wait for nothing: one sample mixes with none.

    Args:
        blocks: of the window.
    """

    def __init__(self, blocks: int) -> None:
        self.taken_back = Doubts(blocks)  #: samples, by reason
        self.handed_out = HandedOut()
        self.tapped = False  #: tapped passes of several samples have come since the last proof of such passes
        self.served = False  #: served passes have, since theirs
        self._noise: NoiseScale | None = None  # as it was at the last mark

    def mark(self, window: BlockWindow, scores: Scores, noise: NoiseScale | None) -> None:
        """Note that everything so far is right."""
        window.mark()
        scores.mark()
        self._noise = None if noise is None else noise.copy()
        self.tapped = self.served = False
        self.handed_out.settle()

    def take_back(
        self, reason: str, window: BlockWindow, scores: Scores, step: OpenStep
    ) -> tuple[int, NoiseScale | None]:
        """Go back to the last mark; return how many samples have come since, and the noise scale as it was."""
        waiting = step.drop()
        if waiting and step.sums is not None:  # their gradients stay in the sum
            step.sums.spoil(f"samples of it were taken back: {reason}")
        count = waiting + window.take_back()
        scores.take_back()
        self.tapped = self.served = False
        self.handed_out.withdraw(f"unproved: a later proof failed: {reason}")
        if count:
            self.taken_back.add(reason, count)
        return count, None if self._noise is None else self._noise.copy()

    def reset(self) -> None:
        """Start a new window."""
        self.taken_back.reset()
        self._start_block()

    def advance(self) -> None:
        """Slide the window by a block."""
        self.taken_back.advance()
        self._start_block()

    def _start_block(self) -> None:
        if self._noise is not None:
            self._noise.reset()

    def merge(self, noise: NoiseScale | None) -> None:
        """Add the noise scale of another window, as good as proved."""
        if self._noise is not None and noise is not None:
            self._noise.merge(noise)
