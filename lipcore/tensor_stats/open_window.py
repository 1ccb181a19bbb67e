"""The open window of a TensorStats: started anew, moved on, saved, and gone on with, on other ranks too."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from lipcore.distributed.placed import counts_here, tied_to
from lipcore.distributed.rank_axis import Place
from lipcore.metric.rank_states import RankStates
from lipcore.metric.state import check_same, checked_count
from lipcore.tensor_stats.block import Block
from lipcore.tensor_stats.sampled_steps import SampledSteps
from lipcore.trajectory.parameters import piece_of


class OpenWindow(SampledSteps):
    """Base of :class:`lipcore.TensorStats`: what becomes of the numbers of sampled steps."""

    _version = 1

    def reset(self) -> None:
        """Start a new window."""
        assert self._found is not None
        self._open.clear()
        self._closed.clear()
        self._skipped = deque([0], maxlen=self._window_blocks)

    def advance(self) -> None:
        """Slide the window by a block."""
        assert self._found is not None
        if self._closed.maxlen:
            self._closed.append(self._open)
            self._open = Block(self._found.size)
        else:
            self._open.clear()
        self._skipped.append(0)

    # ---- state

    def _settings(self) -> dict[str, Any]:
        found = self._found
        return {
            "version": self._version,
            "every_steps": self.every_steps,
            "places": [list(row[:3]) for row in found.rows],
            "extras": [[extra.kind, extra.place, extra.sums, extra.most] for extra in found.extras],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters and the numbers of the open window: tensors, numbers and strings only."""
        blocks = [block.state_dict() for block in (*self._closed, self._open)]
        return {**self._settings(), "steps_seen": self._steps_seen, "blocks": blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model; ValueError naming the first difference, and nothing changed,
        otherwise. What has come of the step under way is forgotten."""
        blocks, steps = self._loaded(state)
        self._step.clear()
        self._forget_step()
        self._steps_seen, self._open = steps, blocks[-1]
        self._closed = deque(blocks[:-1], maxlen=self._window_blocks - 1)

    def _loaded(self, state: Any) -> tuple[list[Block], int]:
        check_same(state, self._settings())
        steps, blocks = checked_count(state, "steps_seen"), state.get("blocks")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= self._window_blocks:
            what = len(blocks) if isinstance(blocks, list) else type(blocks).__name__
            raise ValueError(f"blocks: expected a list of 1 to {self._window_blocks}, got {what}")
        return [self._open.loaded(block, f"blocks[{i}]") for i, block in enumerate(blocks)], steps

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its state with which rows this rank counts: what other ranks hold alike of parameters and gradients
        counts once."""
        held = {name: tensor for name, _, tensor in self._holding.held()}
        rows = [(quantity, name) for quantity, name, *_ in self._found.rows]
        counted = [i for i, (q, name) in enumerate(rows) if q == "output" or counts_here(held[name], place.rank)]
        tied = next((f"parameter '{n}' {why}" for n, t in held.items() if (why := tied_to(t, place.numbers))), "")
        return {}, state | {"counted": counted, "pieces": self._pieces(), "tied": tied}

    def _pieces(self) -> list[str]:
        return [piece_of(tensor) for _, _, tensor in self._holding.held()]

    def _outputs(self) -> list[int]:
        return [i for i, (quantity, *_) in enumerate(self._found.rows) if quantity == "output"]

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return its state without outputs; without parameters and gradients too, where ranks hold parts of these."""
        blocks, _ = self._loaded(rest)
        kept = [] if any(rest["pieces"]) else sorted({*range(self._found.size.places)} - {*self._outputs()})
        for block in blocks:
            block.keep(kept)
            block.passes = 0
        return rest | {"blocks": [block.state_dict() for block in blocks], "counted": []}

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with what all of these have seen."""
        blocks, _ = self._loaded(begin)
        in_parts = any(begin["pieces"])
        for state in others:
            for into, block in zip(blocks, self._loaded(state)[0], strict=True):
                steps = into.steps
                block.keep(state["counted"] if in_parts else self._outputs(), sums=True)
                into.merge(block)
                into.steps = steps  # which all ranks have made together
        return begin | {"blocks": [block.state_dict() for block in blocks]}

    def continues(self, rest: dict[str, Any]) -> bool:
        """Return whether this rank holds the parts of parameters that it held then."""
        return bool(rest.get("pieces") == self._pieces())

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        begin, several = saved.alike, saved.place.ranks > 1
        if begin is not None and not (saved.own is not None and self.continues(saved.own)):
            check_same(begin, self._settings())
            if begin["tied"] or (several and any([*begin["pieces"], *self._pieces()])):
                nothing = self.empty_state(begin | {"pieces": ["all"]})
                self.load_state_dict(nothing)
                held = begin["tied"] or "parameters were in other parts"
                return f"{saved.place} goes on from the states of {saved.ranks} ranks, where {held}"
        return super().load_ranks(saved)

    def merge(self, other: OpenWindow | dict[str, Any]) -> None:
        """Add the window of another TensorStats of the same places, or its state."""
        blocks, steps = self._loaded(other.state_dict() if isinstance(other, OpenWindow) else other)
        for block in blocks:
            self._open.merge(block)
        self._steps_seen += steps
