"""The distributions of a window of norms, per layer and in total; a sliding window is made of blocks."""

from __future__ import annotations

from collections import deque
from typing import Any

from lipcore.metric.distribution import Distribution, reset_all

Block = list[Distribution]  # one per layer, and the total last


class NormWindow:
    """`places` distributions per block, of which `open` is being filled and at most `blocks` - 1 are closed."""

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
        """Everything in the window."""
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
        """{"open": a state per place, "closed": the same per closed block}"""
        return {
            "open": [distribution.state_dict() for distribution in self.open],
            "closed": [[distribution.state_dict() for distribution in block] for block in self._closed],
        }

    def loaded(self, state: dict[str, Any]) -> NormWindow:
        """One like this with the numbers of a state; ValueError when they do not fit."""
        blocks = (self._closed.maxlen or 0) + 1
        if len(state["closed"]) > blocks - 1:
            raise ValueError(f"closed: the state has {len(state['closed'])} blocks, this window {blocks - 1}")
        window = NormWindow(self._places, blocks)
        window._closed.extend(self._read(states) for states in state["closed"])
        window.open = self._read(state["open"])
        return window

    def _read(self, states: list[dict[str, Any]]) -> Block:
        block = self._block()
        for distribution, numbers in zip(block, states, strict=True):
            distribution.load_state_dict(numbers)
        return block
