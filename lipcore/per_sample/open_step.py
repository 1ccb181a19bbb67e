"""The micro-batches since the last optimizer step, until it is known whether that step is made or skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.metric.distribution import Distribution
from lipcore.metric.protocol import TAKEN
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.noise.noise_sums import NoiseSums
from lipcore.per_sample.part_rows import PassRows
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


@dataclass
class Intake:
    """Places that micro-batches are taken into.

    Attributes:
        distributions: of places, per layer and in total.
        scores, losses: statistics per sample id, of the numbers and of the losses.
        rows: squares that ranks are to add up first; None where this rank has whole gradients.
    """

    distributions: list[Distribution]
    scores: Any
    losses: SampleScores
    rows: list[PassRows] | None = None

    def take_in(self, batch: MicroBatch) -> None:
        """Take in a micro-batch."""
        batch.norms.observe(self.distributions)
        if self.rows is not None and isinstance(batch.norms, PassNorms):
            self.rows.append(PassRows(*batch.norms.in_parts, batch.ids, batch.losses))
        elif batch.ids is not None:
            self.scores.observe(batch.ids, batch.norms.per_sample)
            if batch.losses is not None:
                self.losses.observe(batch.ids, batch.losses)

    def take_all(self, other: Intake) -> None:
        """Take in what another one has taken in."""
        for into, held in zip(self.distributions, other.distributions, strict=True):
            into.merge(held)
        self.scores.merge(other.scores)
        self.losses.merge(other.losses)
        if self.rows is not None:
            self.rows += other.rows or []


class OpenStep:
    """Micro-batches of the open step, which are all given away, or forgotten.

    Args:
        sums: of the noise scale, if it is wanted.
        make_scores: makes what keeps statistics per sample id.
        in_parts: ranks hold parts of samples' gradients.
    """

    def __init__(self, sums: NoiseSums | None, make_scores: Callable[[], Scores], *, in_parts: bool = False) -> None:
        self.sums, self._make_scores, self._in_parts = sums, make_scores, in_parts
        self._forget()

    def _forget(self) -> None:
        self.samples = 0
        self._waiting: list[MicroBatch] = []
        self._held: Intake | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting) or self._held is not None

    def add(self, batch: MicroBatch, places: int) -> None:
        """Add a micro-batch."""
        self._waiting.append(batch)
        if self.sums is not None:
            self.sums.expect(batch.norms.record)
        self.samples += batch.norms.samples
        if len(self._waiting) >= _MOST:
            distributions = [Distribution() for _ in range(places)]
            rows: list[PassRows] | None = [] if self._in_parts else None
            self._held = self._held or Intake(distributions, self._make_scores(), SampleScores(), rows)
            self._hand_on(self._held)

    def read_gradients(self) -> None:
        """Read the gradients that have accumulated so far, for the noise scale."""
        if self.sums is not None and self:
            self.sums.read_gradients()

    def lose_gradients(self) -> None:
        """Leave the step out of the noise scale: optimizers have stepped within the backward pass."""
        if self.sums is not None:
            self.sums.spoil(f"{TAKEN}; pass noise_scale=False")

    @property
    def hooked(self) -> bool:
        """True where steps were left out of the noise scale because parameters have hooks."""
        return self.sums is not None and self.sums.hooked

    def batches(self) -> list[MicroBatch]:
        """Return the micro-batches; none where some are summed up already."""
        return [] if self._held is not None else list(self._waiting)

    def _hand_on(self, into: Intake) -> None:
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            into.take_in(batch)
            if self.sums is not None and isinstance(batch.norms, PassNorms):
                self.sums.add(batch.norms)

    def take_into(self, into: Intake) -> None:
        """Hand everything on: the step was made."""
        if self._held is not None:
            into.take_all(self._held)
        self._hand_on(into)
        self._forget()

    def drop(self) -> int:
        """Forget everything, since the step was skipped or is none, and return how many samples do not count."""
        samples = self.samples
        self._forget()
        if self.sums is not None:
            self.sums.drop()
        return samples
