"""Single steps of a window that is longer than the ring, where several ranks will ask for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.metric.state import checked_tensor, is_count
from lipcore.models.ranks import world_size

#: Bytes that are kept beside the ring at most.
MOST_BYTES = 64 << 20


class KeptSteps:
    """Blocks of steps that the ring is about to overwrite: what is said of shards together is made of the squares of
    single steps.

    Args:
        tensors: how many of a ring's rows are those of tensors; the others follow from these.
    """

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._blocks: list[tuple[int, Tensor]] = []  # number of the first step, [steps, tensors, 2]
        self._bytes = 0

    def add(self, ring: Tensor, begin: int, end: int) -> None:
        """Keep the steps from `begin` to before `end`, where there are other ranks; the oldest go where there is no
        more room."""
        if end <= begin or world_size() == 1:
            return
        block = _of_ring(ring, begin, end)[:, : self._tensors].clone()
        self._blocks.append((begin, block))
        self._bytes += block.nbytes
        while self._bytes > MOST_BYTES:
            self._bytes -= self._blocks.pop(0)[1].nbytes

    def drop_before(self, begin: int) -> None:
        """Forget blocks that end before this step."""
        while self._blocks and self._blocks[0][0] + len(self._blocks[0][1]) <= begin:
            self._bytes -= self._blocks.pop(0)[1].nbytes

    def state(self, before: int) -> dict[str, Any]:
        """Return the last steps without a gap up to the step `before`, which is the first that the ring has, for a
        checkpoint."""
        parts, begin = [], before
        for first, block in reversed(self._blocks):
            if first >= begin:
                continue
            if first + len(block) < begin:
                break
            parts.append(block[: begin - first])
            begin = first
        nothing = torch.empty(0, self._tensors, 2, dtype=torch.float64, device="cpu")
        steps = torch.cat(parts[::-1]).cpu() if parts else nothing
        return {"begin": begin if parts else 0, "steps": steps}

    def checked(self, state: Any) -> tuple[int, Tensor]:
        """Return what :meth:`state` gave; ValueError naming what is no such thing."""
        if not isinstance(state, dict) or not is_count(state.get("begin")):
            raise ValueError(f"expected the number of the first step and the steps, got {state!r:.80}")
        return state["begin"], checked_tensor("steps", state.get("steps"), torch.float64, (None, self._tensors, 2))

    def load(self, begin: int, steps: Tensor, device: torch.device) -> None:
        """Keep these steps and no others."""
        self.clear()
        if len(steps):
            self._blocks.append((begin, steps.to(device, copy=True)))
            self._bytes = steps.nbytes

    def window(self, ring: Tensor, begin: int, end: int) -> Tensor | None:
        """Return the steps from `begin` to before `end`, [steps, tensors, 2]; None where some of them are gone."""
        self.drop_before(begin)
        parts, at = [], begin
        for first, block in self._blocks:
            if first > at or at >= end:
                break
            part = block[at - first : end - first]
            parts.append(part)
            at += len(part)
        if at < end:
            if at < end - len(ring):
                return None
            parts.append(_of_ring(ring, at, end)[:, : self._tensors])
        return torch.cat(parts) if parts else ring.new_empty(0, self._tensors, 2)


def _of_ring(ring: Tensor, begin: int, end: int) -> Tensor:
    return ring[torch.arange(begin, end, device=ring.device) % len(ring)]
