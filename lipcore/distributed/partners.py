"""The other ranks of a Monitor or of a metric that stands alone: which they are now, and where they are met."""

from __future__ import annotations

import math
import weakref
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.group import Group, checked_group, found_group
from lipcore.distributed.meeting import Header, Meeting
from lipcore.models.ranks import under_process_group

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
        self._had: Group | None = None  # the last that was found
        with suppress(ValueError):  # of a rank that is in no group, which is said when it is asked for
            self.find()

    @property
    def none_asked_for(self) -> bool:
        """True with group=None."""
        return self._given is None

    def find(self) -> Group | None:
        """Return the group as it is now; None where this process stands alone."""
        found = found_group(self._given)
        self._had = found or self._had
        return found

    @property
    def lost(self) -> Group | None:
        """The group that there was, where torch.distributed has no process group any more."""
        return None if self._had is None or under_process_group() else self._had

    def meet(self, group: Group, what: str, step: int, header: Header) -> list[Header]:
        """Return the headers of all ranks; what :meth:`Meeting.meet` raises."""
        try:
            meeting = _meeting(group)
            return meeting.meet(what, step, header, self._timeout, meeting.number_of(self))
        except torch.distributed.DistError as error:
            raise _unreached(what, error) from error

    def pass_by(self, group: Group, what: str, step: int) -> None:
        """Tell the other ranks that this one has nothing to meet them for at this step."""
        with suppress(torch.distributed.DistError):  # who waits is told of it by the store itself
            meeting = _meeting(group)
            meeting.pass_by(what, step, meeting.number_of(self))

    def kept(self, group: Group) -> list[Tensor]:
        """Return the memory in which this group's collectives are made, none or one; the same for all callers."""
        return _meeting(group).kept

    def go_back(self) -> None:
        """Take back that this rank has passed by at steps that a loaded checkpoint has made undone."""
        with suppress(RuntimeError, ValueError):  # the store is gone, or this rank is in no group: nobody waits
            group = self.find()
            met = _meetings.get(torch.distributed.group.WORLD, {}) if group is not None else {}
            if group is not None and group.name in met:
                met[group.name].go_back()

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
        return {"_given": None, "_timeout": self._timeout, "_had": None}


def _unreached(what: str, error: Exception) -> RuntimeError:
    """Return the error of a rank that does not reach the store."""
    said = (str(error).splitlines() or [""])[0][:200]
    return RuntimeError(
        f"lipcore: {what}: the process group's store does not answer ({type(error).__name__}: {said}), so the process "
        "that keeps it has ended: rank 0, or torchrun's agent. No collective was started; this rank's own numbers can "
        "be read. Start the training anew from a checkpoint"
    )


def _meeting(group: Group) -> Meeting:
    """Return where the ranks of a group meet: one place for all Monitors, whose calls come in the same order on all
    ranks."""
    meetings = _meetings.setdefault(torch.distributed.group.WORLD, {})
    if group.name not in meetings:
        meetings[group.name] = Meeting(group.store, f"lipcore/{group.name}", group.place, group.ranks)
    return meetings[group.name]
