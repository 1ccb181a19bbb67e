"""The other ranks of a Monitor or of a metric that stands alone: which they are now, and where they are met."""

from __future__ import annotations

import math
import weakref
from numbers import Real
from typing import Any

import torch

from lipcore.distributed.group import Group, checked_group, found_group
from lipcore.distributed.meeting import Header, Meeting

#: By the default process group and the name of the group.
_meetings: weakref.WeakKeyDictionary[Any, dict[str, Meeting]] = weakref.WeakKeyDictionary()


class Partners:
    """The ranks of a group, which is looked up at every call, since it may be made after this object.

    Args:
        group: "auto" for the default process group, where there is one; None for none; a ProcessGroup or a DeviceMesh.
        timeout: seconds to wait for the others.

    Raises:
        TypeError, ValueError: naming the argument that is none of these.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        if not isinstance(timeout, Real) or isinstance(timeout, bool):
            raise TypeError(f"timeout: expected seconds, got {type(timeout).__name__}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected seconds > 0, got {timeout!r}")
        self._given: Any = checked_group(group)
        self._timeout: float = float(timeout)

    @property
    def none_asked_for(self) -> bool:
        """True with group=None."""
        return self._given is None

    def find(self) -> Group | None:
        """Return the group as it is now; None where this process stands alone."""
        return found_group(self._given)

    def meet(self, group: Group, what: str, step: int, header: Header) -> list[Header]:
        """Return the headers of all ranks; what :meth:`Meeting.meet` raises."""
        meeting = _meeting(group)
        return meeting.meet(what, step, header, self._timeout, meeting.number_of(self))

    def pass_by(self, group: Group, what: str, step: int) -> None:
        """Tell the other ranks that this one has nothing to meet them for at this step."""
        meeting = _meeting(group)
        meeting.pass_by(what, step, meeting.number_of(self))

    def leave_word(self, group: Group, where: str, word: str, over: str = "") -> str:
        """Leave a word for all ranks in the place of this one, "" for none, unless another stands there; return the one
        that stands."""
        meeting = _meeting(group)
        return meeting.leave_word(f"{meeting.number_of(self)}/{where}", word, over)

    def word(self, group: Group, where: str) -> str:
        """Return the word that a rank has left; "" where none has."""
        meeting = _meeting(group)
        return meeting.word(f"{meeting.number_of(self)}/{where}")

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy has: no process group."""
        return {"_given": None, "_timeout": self._timeout}


def _meeting(group: Group) -> Meeting:
    """Return where the ranks of a group meet: one place for all Monitors, whose calls come in the same order on all
    ranks."""
    meetings = _meetings.setdefault(torch.distributed.group.WORLD, {})
    if group.name not in meetings:
        meetings[group.name] = Meeting(group.store, f"lipcore/{group.name}", group.place, group.ranks)
    return meetings[group.name]
