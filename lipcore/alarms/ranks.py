"""Alarms of several ranks: what this one has told, for the others, and what these have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lipcore.alarms.event import AlarmEvent

_MOST = 8  # events that a rank says at a time; the others wait for the next
_KEPT = 1000  # of those that wait; older ones are not told


class EventsOfRanks:
    """Keeper of the events of all ranks. An event that several have told, with the same step, signal and place, is one:
    that of the first of them.

    Attributes:
        all: what the ranks have said to each other, by step, the same on all of them.
    """

    def __init__(self) -> None:
        self.all: list[AlarmEvent] = []
        self._waiting: list[AlarmEvent] = []
        self._said: list[AlarmEvent] = []
        self._own: set[tuple[int, str, str]] = set()

    def add(self, event: AlarmEvent) -> bool:
        """Take an event of this rank; return whether it is new, or another rank has told it already."""
        self._own.add(_key(event))
        if any(_key(one) == _key(event) for one in self.all):
            return False
        self._waiting = [*self._waiting, event][-_KEPT:]
        return True

    def waits(self, event: AlarmEvent) -> bool:
        """Return whether the other ranks are still to hear of an event of this one."""
        return event in self._waiting

    def said(self) -> list[list[Any]]:
        """Return what this rank has to say, JSON-ready: what is not finite goes first."""
        self._said = sorted(self._waiting, key=lambda event: event.signal != "nonfinite")[:_MOST]
        return [[one.step, one.signal, one.place, one.score, one.message] for one in self._said]

    def heard(self, said: Mapping[int, Sequence[Sequence[Any]] | None]) -> tuple[list[AlarmEvent], list[AlarmEvent]]:
        """Take what each rank has said, by its number; return what is new, the same on all ranks, and what of it this
        rank has not told itself."""
        known = set(map(_key, self.all))
        fresh: dict[tuple[int, str, str], AlarmEvent] = {}
        for rank, events in said.items():
            for step, signal, place, score, message in events or ():
                words = message.replace(f"alarm in step {step}", f"alarm in step {step} on rank {rank}", 1)
                event = AlarmEvent(step, signal, place, score, words, rank)
                if _key(event) not in known:
                    fresh.setdefault(_key(event), event)
        new = [fresh[key] for key in sorted(fresh)]
        self.all = sorted([*self.all, *new], key=_key)
        self._waiting = [event for event in self._waiting if event not in self._said]
        return new, [event for event in new if _key(event) not in self._own]

    def forget(self, step: int) -> None:
        """Go on behind a step: what was told of later ones is not of this training."""
        self.all[:] = [event for event in self.all if event.step <= step]
        self._waiting = [event for event in self._waiting if event.step <= step]
        self._own = {key for key in self._own if key[0] <= step}


def _key(event: AlarmEvent) -> tuple[int, str, str]:
    return event.step, event.signal, event.place
