"""The distributions of a window, a list of them per block: a sliding window is made of several blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from lipcore.metric.distribution import Distribution, loaded_distributions, reset_all

Block = list[Distribution]  # one per place


class BlockWindow:
    """Distributions of a window's values, one per place and block: the `open` block is being filled, at most
    `blocks` - 1 are closed. The open block's distributions are the same objects all the time: compiled code may hold
    them.

    :meth:`mark` notes that everything so far is proved to be right, and :meth:`take_back` goes back to there. So a
    second block stands beside each, with what it had at the last mark: nothing else is kept, however long ago that was.
    """

    def __init__(self, places: int, blocks: int) -> None:
        self._places, self.blocks = places, blocks
        self.open, self.proved = self._block(), self._block()
        self._closed: deque[Block] = deque(maxlen=blocks - 1)
        self._closed_proved: deque[Block] = deque(maxlen=blocks - 1)
        self._gone = 0  # samples since the last mark that are not in the window any more

    def _block(self) -> Block:
        return [Distribution() for _ in range(self._places)]

    @property
    def cores(self) -> list[Any]:
        """The compiled objects of the open block."""
        return [distribution.core for distribution in self.open]

    def merged(self) -> Block:
        """Return the distributions of the whole window."""
        if not self._closed:
            return list(self.open)
        merged = self._block()
        for block in (*self._closed, self.open):
            _add(merged, block)
        return merged

    def advance(self) -> None:
        """Close the open block; the oldest one falls out."""
        before = self.unproved
        if self._closed.maxlen:
            self._closed.append(self._copied(self.open))
            self._closed_proved.append(self._copied(self.proved))
        self._start(before)

    def reset(self) -> None:
        """Start anew."""
        before = self.unproved
        self._closed.clear()
        self._closed_proved.clear()
        self._start(before)

    def _start(self, unproved: int) -> None:
        self._gone = 0
        self.drop(range(self._places))
        self._gone = unproved - self.unproved

    def drop(self, places: Sequence[int]) -> None:
        """Forget what the open block has in these places."""
        reset_all([block[place] for place in places for block in (self.open, self.proved)])

    def _copied(self, block: Block) -> Block:
        copied = self._block()
        _add(copied, block)
        return copied

    # ---- what is proved

    @property
    def unproved(self) -> int:
        """The number of samples, missing ones included, that have come since the last mark."""
        return self._gone + _samples([*self._closed, self.open]) - _samples([*self._closed_proved, self.proved])

    def mark(self) -> None:
        """Note that everything so far is right."""
        self._gone = 0
        self._closed_proved = deque(self._closed, self._closed.maxlen)
        reset_all(self.proved)
        _add(self.proved, self.open)

    def take_back(self) -> int:
        """Go back to where the last mark was, and return how many samples have come since, those included that are not
        in the window any more."""
        unproved = self.unproved
        self._gone = 0
        self._closed = deque(self._closed_proved, self._closed.maxlen)
        reset_all(self.open)
        _add(self.open, self.proved)
        return unproved

    # ---- state

    def state_dict(self, name: str = "open") -> dict[str, Any]:
        """Return {name: a state per place of the open block, "closed": the same per closed block}."""
        return {
            name: [distribution.state_dict() for distribution in self.open],
            "closed": [[distribution.state_dict() for distribution in block] for block in self._closed],
        }

    def loaded(self, state: dict[str, Any], name: str = "open") -> BlockWindow:
        """Return one like this with the numbers of a state, as good as proved; ValueError naming the first that does
        not fit."""
        blocks, closed = self.blocks, state.get("closed")
        first = loaded_distributions(name, state.get(name), self._places)
        if not isinstance(closed, list) or len(closed) > blocks - 1:
            seen = f"{len(closed)} of them" if isinstance(closed, list) else type(closed).__name__
            raise ValueError(f"closed: expected a list of at most {blocks - 1} blocks, got {seen}")
        window = BlockWindow(self._places, blocks)
        window.open = first
        window._closed.extend(
            loaded_distributions(f"closed[{i}]", states, self._places) for i, states in enumerate(closed)
        )
        window.mark()
        return window

    def become(self, other: BlockWindow) -> None:
        """Take over the numbers of a window of the same places and as many blocks, as good as proved."""
        self._closed = deque(other._closed, self._closed.maxlen)
        reset_all(self.open)
        _add(self.open, other.open)
        self.mark()

    def merge(self, other: BlockWindow) -> None:
        """Add another window of the same places, all its blocks, to the open block; what it has is as good as
        proved."""
        for block in (self.open, self.proved):
            _add(block, other.merged())


# ---- states of several ranks


def empty_blocks(state: dict[str, Any], name: str = "open") -> dict[str, Any]:
    """Return the state of a :class:`BlockWindow` with as many places and blocks and nothing in them."""
    empty = Distribution().state_dict()
    return {name: [empty for _ in state[name]], "closed": [[empty for _ in block] for block in state["closed"]]}


def added_blocks(states: Sequence[dict[str, Any]], name: str = "open") -> dict[str, Any]:
    """Return the state that has what all of these have, block by block; ValueError where they have other places or
    other numbers of blocks."""
    places, blocks = len(states[0][name]), len(states[0]["closed"])
    if any(len(state[name]) != places or len(state["closed"]) != blocks for state in states):
        raise ValueError(f"{name}: the states of ranks have other places or blocks than each other")
    window = BlockWindow(places, blocks + 1)
    window._closed.extend(window._block() for _ in range(blocks))
    for state in states:
        for into, found in zip((window.open, *window._closed), (state[name], *state["closed"]), strict=True):
            _add(into, loaded_distributions(name, found, places))
    return window.state_dict(name)


def _add(into: Block, block: Block) -> None:
    for mine, theirs in zip(into, block, strict=True):
        mine.merge(theirs)


def _samples(blocks: Sequence[Block]) -> int:
    firsts = [block[0] for block in blocks if block]  # a place without a number counts a missing one
    return sum(first.count + first.missing + first.invalid for first in firsts)
