"""Results that were handed out before all of their samples were proved, and that a failed proof may still reach."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Protocol


class Withdrawable(Protocol):
    """Numbers that were handed out: a result, or what a rank adds to one of all."""

    def withdraw(self, why: str, names: Collection[str] | None = None) -> None:
        """Give up its numbers, or those of some quantities, for a reason."""


class HandedOut:
    """The results with samples that no proof has come after yet; nothing here keeps them alive."""

    def __init__(self) -> None:
        self._results: list[weakref.ref[Withdrawable]] = []

    def add(self, result: Withdrawable) -> None:
        """Remember a result that holds such samples."""
        self._results = [known for known in self._results if known() is not None]
        self._results.append(weakref.ref(result))

    def __bool__(self) -> bool:
        return any(known() is not None for known in self._results)

    def settle(self) -> None:
        """Forget all of them: a good proof has come."""
        self._results.clear()

    def withdraw(self, why: str, names: Collection[str] | None = None) -> None:
        """Make the numbers of all of them NaN (of the quantities with these names), with the reason: a proof has
        failed."""
        for known in self._results:
            result = known()
            if result is not None:
                result.withdraw(why, names)
        self._results.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_results": []}  # those of the original
