"""What the exact checks have found lately, which they do not tell again."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import TypeVar

from lipcore.alarms.budget import QUIET

_Key = TypeVar("_Key", bound=Hashable)


class Repeats:
    """Memory of what was found."""

    def __init__(self) -> None:
        self._last: dict[Hashable, int] = {}

    def fresh(self, step: int, found: Collection[_Key], within: int = QUIET) -> list[_Key]:
        """Return, in their order, those that were not found in so many steps before; note all of them."""
        fresh = [key for key in found if step - self._last.get(key, -within - 1) > within]
        self._last |= dict.fromkeys(found, step)
        return fresh
