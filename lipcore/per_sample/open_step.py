"""The micro-batches since the last optimizer step, until it is known whether that step is made or skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.metric.distribution import Distribution
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.noise.noise_sums import NoiseSums
from lipcore.per_sample.pass_norms import PassNorms
from lipcore.per_sample.scores.sample_scores import SampleScores
from lipcore.per_sample.scores.score_columns import Scores

# As many are kept as they are: then they are summed up, so that nothing grows in a loop that never steps. Summing up
# may wait for the device, which is why it is rare.
_MOST = 256


class PassNumbers(Protocol):
    """The numbers of one backward pass's samples."""

    record: LayerRecord
    factor: LossFactor

    @property
    def samples(self) -> int:
        """Number of samples, B."""

    @property
    def per_sample(self) -> Tensor:
        """Numbers over all measured parameters: [B], or [B, K]."""

    def observe(self, distributions: list[Distribution]) -> None:
        """Add the numbers to the distributions of a window's places."""


class MicroBatch(NamedTuple):
    """Micro-batch: what a backward pass has brought of its samples."""

    norms: PassNumbers
    ids: Tensor | None  #: [B]
    losses: Tensor | None  #: [B]


class OpenStep:
    """Micro-batches of the open step, which are all given away, or forgotten.

    Args:
        sums: of the noise scale, if it is wanted.
        make_scores: makes what keeps statistics per sample id.
    """

    def __init__(self, sums: NoiseSums | None, make_scores: Callable[[], Scores]) -> None:
        self.sums, self._make_scores = sums, make_scores
        self._forget()

    def _forget(self) -> None:
        self.samples = 0
        self._waiting: list[MicroBatch] = []
        self._held: tuple[list[Distribution], Scores, SampleScores] | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting) or self._held is not None

    def add(self, batch: MicroBatch, places: int) -> None:
        """Add a micro-batch."""
        self._waiting.append(batch)
        if self.sums is not None:
            self.sums.expect(batch.norms.record)
        self.samples += batch.norms.samples
        if len(self._waiting) >= _MOST:
            self._held = self._held or (
                [Distribution() for _ in range(places)],
                self._make_scores(),
                SampleScores(),
            )
            self._hand_on(*self._held)

    def batches(self) -> list[MicroBatch]:
        """Return the micro-batches; none where some are summed up already."""
        return [] if self._held is not None else list(self._waiting)

    def _hand_on(self, distributions: list[Distribution], scores: Any, losses: SampleScores) -> None:
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            take_in(batch, distributions, scores, losses)
            if self.sums is not None and isinstance(batch.norms, PassNorms):
                self.sums.add(batch.norms)

    def take_into(self, distributions: list[Distribution], scores: Any, losses: SampleScores) -> None:
        """Hand everything on: the step was made."""
        if self._held is not None:
            for into, held in zip(distributions, self._held[0], strict=True):
                into.merge(held)
            scores.merge(self._held[1])
            losses.merge(self._held[2])
        self._hand_on(distributions, scores, losses)
        self._forget()

    def drop(self) -> int:
        """Forget everything, since the step was skipped or is none, and return how many samples do not count."""
        samples = self.samples
        self._forget()
        if self.sums is not None:
            self.sums.drop()
        return samples


def take_in(batch: MicroBatch, distributions: list[Distribution], scores: Any, losses: SampleScores) -> None:
    """Take in the norms of a micro-batch, per layer, in total and per sample id, and the losses per sample id."""
    batch.norms.observe(distributions)
    if batch.ids is not None:
        scores.observe(batch.ids, batch.norms.per_sample)
        if batch.losses is not None:
            losses.observe(batch.ids, batch.losses)
