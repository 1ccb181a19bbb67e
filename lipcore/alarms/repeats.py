"""What the exact checks have found lately, which they do not tell again."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import TypeVar

from lipcore.alarms.budget import QUIET

_Key = TypeVar("_Key", bound=Hashable)


class Repeats:
    """Memory of what was found in the last 20 steps, or in so many."""

    def __init__(self, steps: int = QUIET) -> None:
        self._steps = steps
        self._last: dict[Hashable, int] = {}

    def fresh(self, step: int, found: Collection[_Key]) -> list[_Key]:
        """Return, in their order, those that were not found in the steps before; note all of them."""
        fresh = [key for key in found if step - self._last.get(key, -self._steps - 1) > self._steps]
        self._last |= dict.fromkeys(found, step)
        return fresh
