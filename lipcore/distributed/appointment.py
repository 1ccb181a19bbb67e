"""Appointments of ranks that do not meet by themselves: one asks, and all of them meet some steps later."""

from __future__ import annotations

from lipcore.distributed.group import Group
from lipcore.distributed.partners import Partners

_EVERY = 8  # steps from one look to the next, each of which asks the store once
#: Steps from the asking to the meeting. Ranks that average gradients are one step apart at most on their devices; how
#: far a process is ahead of its device is not known. Where that is further, a rank has passed the step of the meeting
#: when it is asked: they find that they are at different places, and a loop that waits for its device now and then is
#: the remedy.
AHEAD = 8


class Appointment:
    """The appointment of one rank with its partners. Ranks look for one at the same steps, so all of them find it in
    the same call.

    Args:
        partners: the other ranks.

    Attributes:
        asked: this rank has asked for it, and it has been neither kept nor called off.
    """

    def __init__(self, partners: Partners) -> None:
        self.asked = False
        self._partners = partners
        self._word = ""  # that stood when this rank looked last
        self._kept = 0  # appointments
        self._looked = -1  # in which stretch of steps

    @property
    def _place(self) -> str:
        return f"appointment/{self._kept}"

    def ask(self, group: Group, step: int) -> None:
        """Ask all ranks to meet some steps behind this one, where none has asked yet."""
        word = str(step + AHEAD)
        stands = self._partners.leave_word(group, self._place, word)
        if stands and int(stands) > step + 2 * AHEAD:  # asked in a step that a loaded checkpoint has taken back
            stands = self._partners.leave_word(group, self._place, word, over=stands)
        self._word, self.asked = stands, True

    def keep(self) -> None:
        """Note that all have met."""
        self._kept += 1
        self.asked = False

    def call_off(self, group: Group) -> None:
        """Note for all ranks that they do not meet, so that none waits for the others later; what was asked for since
        then stands."""
        self.asked = False
        self._partners.leave_word(group, self._place, "", over=self._word)

    def forget(self) -> None:
        """Note that what this rank has asked for is not of its training any more: a checkpoint was loaded."""
        self.asked = False

    def looks(self, step: int) -> bool:
        """Return whether this rank looks for an appointment in this call: in the first of each stretch of steps."""
        return step // _EVERY != self._looked

    def is_due(self, group: Group, step: int) -> bool:
        """Look, and return whether the ranks are to meet in this call."""
        self._looked = step // _EVERY
        self._word = self._partners.word(group, self._place)
        return bool(self._word) and int(self._word) <= step

    @property
    def is_called_off(self) -> bool:
        """True where this rank has asked, and has found when it looked that another one has called it off."""
        return self.asked and not self._word
