"""A proof that the user asks for, of a pass that is none of the training's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_NO_PASS = "the model was not called in the pass that was to be proved"

#: Why a pass is not proved, with its samples; and where only the user's prove() proves any.
NOT_YET = "no batch of {0} samples was proved yet"
ASK = NOT_YET + ", and after alarms no pass of a sharded model proves itself; call monitor.prove(batch) on all ranks"


class Disproved(ValueError):
    """The error that says that the samples of a pass depend on each other."""


@dataclass
class AskedProof:
    """State of a proof that was asked for. It is thrown away with it: nothing of a pass that was broken off
    stays.

    Attributes:
        answer: what the proof has left unproved; "" for nothing.
        later: what is looked at when the pass is over on all ranks, if they do it together; returns what is unproved.
    """

    answer: str = _NO_PASS
    later: Callable[[bool], str] | None = None

    @property
    def waits(self) -> bool:
        """True where :meth:`finish` has passes to run, which speak to other ranks."""
        return self.later is not None

    def finish(self, *, together: bool) -> None:
        """Look at what could not be looked at within the pass, where all ranks do it `together`.

        Raises:
            Disproved: samples depend on each other in a way that spoils all norms.
        """
        later, self.later = self.later, None
        if later is not None:
            found = later(together)
            self.answer = self.answer or found
