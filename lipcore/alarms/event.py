"""What an alarm says, and the exception that ends a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlarmEvent:
    """One alarm."""

    step: int  #: number of the optimizer step, from 1
    signal: str  #: of the table of :class:`Alarms`, or an exact one: "nonfinite", "unexplained_movement", "sample_ids"
    place: str  #: group of parameters; a parameter for the exact ones; "total" where none stands out
    score: float  #: what was compared with the signal's limit; infinite for "nonfinite", samples for "sample_ids"
    message: str  #: a sentence for people
    rank: int | None = None  #: that has told it, of an event of several ranks; None: this one


class AlarmStop(RuntimeError):
    """The error that ends a training after an alarm; :attr:`event` says which."""

    def __init__(self, event: AlarmEvent) -> None:
        super().__init__(event.message)
        self.event = event

    def __reduce__(self) -> tuple[type[AlarmStop], tuple[AlarmEvent]]:
        return type(self), (self.event,)
