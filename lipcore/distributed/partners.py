"""The other ranks of a Monitor or of a metric that stands alone: which they are now, and where they are met."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from lipcore.distributed.group import Group, checked_group, found_group
from lipcore.distributed.meeting import Header, Meeting, numbered


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
        self._met: tuple[Any, Meeting] | None = None

    @property
    def none_asked_for(self) -> bool:
        """True with group=None."""
        return self._given is None

    def find(self) -> Group | None:
        """Return the group as it is now; None where this process stands alone."""
        return found_group(self._given)

    def meet(self, group: Group, what: str, when: str, header: Header) -> list[Header]:
        """Return the headers of all ranks; what :meth:`Meeting.meet` raises."""
        world = torch.distributed.group.WORLD
        if self._met is None or self._met[0] is not world:  # another process group in the place of one that was ended
            name = numbered(f"lipcore/{group.name}")
            self._met = world, Meeting(group.store, name, group.place, group.ranks, self._timeout)
        return self._met[1].meet(what, when, header)

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy has: no process group."""
        return {"_given": None, "_timeout": self._timeout, "_met": None}
