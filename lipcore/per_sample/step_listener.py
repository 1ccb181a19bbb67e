"""Who is told of the samples of every single step."""

from __future__ import annotations

from collections.abc import Sequence

from lipcore.per_sample.open_step import MicroBatch


class StepListener:
    """Base of what is told which samples a step was made of, with their numbers; nothing is to wait for a device."""

    def step_samples(self, batches: Sequence[MicroBatch], doubt: str) -> None:
        """Take the micro-batches of a step that was made, and why their numbers are not known, not proved to be those
        of single samples, or not of all parameters; "" where they are."""

    def samples_proved(self) -> None:
        """Note that the numbers of all steps so far are those of single samples."""

    def samples_taken_back(self, reason: str) -> None:
        """Forget the numbers of the steps since then: a proof has failed."""
