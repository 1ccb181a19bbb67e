"""Appointments of ranks that do not meet by themselves: one asks, and all of them meet some steps later."""

from __future__ import annotations

from lipcore.distributed.group import Group
from lipcore.distributed.partners import Partners

_EVERY = 8  # steps from one look to the next, each of which asks the store once
#: Steps from the asking to the meeting. Ranks that average gradients are one step apart at most; how far a process is
#: ahead of its device is not known, and where that is further they find that they are at different places.
_AHEAD = 8


class Appointment:
    """The appointment of one rank with its partners. Ranks look for one at the same steps, so all of them find it in
    the same call.

    Args:
        partners: the other ranks.
    """

    def __init__(self, partners: Partners) -> None:
        self._partners = partners
        self._kept = 0  # appointments
        self._looked = -1  # in which stretch of steps

    @property
    def _place(self) -> str:
        return f"appointment/{self._kept}"

    def ask(self, group: Group, step: int) -> None:
        """Ask all ranks to meet some steps behind this one, where none has asked yet."""
        self._partners.leave_word(group, self._place, str(step + _AHEAD))

    def keep(self) -> None:
        """Note that all have met."""
        self._kept += 1

    def call_off(self, group: Group) -> None:
        """Note for all ranks that they have not met, so that none waits for the others later."""
        self._partners.take_back_word(group, self._place)

    def is_due(self, group: Group, step: int) -> bool:
        """Return whether the ranks are to meet in this call, the first in its stretch of steps."""
        if step // _EVERY == self._looked:
            return False
        self._looked = step // _EVERY
        word = self._partners.word(group, self._place)
        return bool(word) and int(word) <= step
