"""The distributions of a window of norms, per layer and in total; a sliding window is made of blocks."""

from __future__ import annotations

from collections import deque
from typing import Any

from lipcore.metric.distribution import Distribution, loaded_distributions, reset_all

Block = list[Distribution]  # one per layer, and the total last


class NormWindow:
    """Distributions of a window's norms, one per place (layers, then the total) and block: the `open` block is being
    filled, at most `blocks` - 1 are closed."""

    def __init__(self, places: int, blocks: int) -> None:
        self._places = places
        self.open = self._block()
        self._closed: deque[Block] = deque(maxlen=blocks - 1)

    def _block(self) -> Block:
        return [Distribution() for _ in range(self._places)]

    @property
    def cores(self) -> list[Any]:
        """The compiled objects of the open block."""
        return [distribution.core for distribution in self.open]

    def merged(self) -> Block:
        """Return the distributions of the whole window."""
        if not self._closed:
            return self.open
        merged = self._block()
        for block in (*self._closed, self.open):
            for into, distribution in zip(merged, block, strict=True):
                into.merge(distribution)
        return merged

    def advance(self) -> None:
        """Close the open block; the oldest one falls out."""
        self._closed.append(self.open)
        self.open = self._block()

    def reset(self) -> None:
        """Start anew."""
        self._closed.clear()
        reset_all(self.open)

    def state_dict(self) -> dict[str, Any]:
        """Return {"open": a state per place, "closed": the same per closed block}."""
        return {
            "open": [distribution.state_dict() for distribution in self.open],
            "closed": [[distribution.state_dict() for distribution in block] for block in self._closed],
        }

    def loaded(self, state: dict[str, Any]) -> NormWindow:
        """Return one like this with the numbers of a state; ValueError naming the first that does not fit."""
        blocks, closed = (self._closed.maxlen or 0) + 1, state.get("closed")
        if not isinstance(closed, list) or len(closed) > blocks - 1:
            seen = f"{len(closed)} of them" if isinstance(closed, list) else type(closed).__name__
            raise ValueError(f"closed: expected a list of at most {blocks - 1} blocks, got {seen}")
        window = NormWindow(self._places, blocks)
        window._closed.extend(
            loaded_distributions(f"closed[{i}]", states, self._places) for i, states in enumerate(closed)
        )
        window.open = loaded_distributions("open", state.get("open"), self._places)
        return window

    def merge(self, other: NormWindow) -> None:
        """Add another window of the same places, all its blocks, to the open block."""
        for mine, theirs in zip(self.open, other.merged(), strict=True):
            mine.merge(theirs)
