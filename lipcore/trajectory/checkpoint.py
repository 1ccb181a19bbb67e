"""Checks of a saved state against what is expected, before anything is taken over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lipcore import _core


def check_counters(state: dict[str, Any], rows: Tensor, group: int) -> None:
    """ValueError when what the core uses as an index, or the counts of steps, could not be those of a ledger."""
    given = state["rows"]
    if not bool((given[:, group] == rows[:, group].cpu().to(given.device)).all()):
        raise ValueError("rows: the groups of its tensors are others than here")
    written = float(state["cursor"][0])
    if not (0 <= written < 2**53 and written.is_integer()):
        raise ValueError(f"cursor: expected a count of steps, got {written}")
    recent, seen = state["recent"], state["settled"] + state["open_steps"]
    if state["open_steps"] >= _core.BLOCK_STEPS:
        raise ValueError(f"open_steps: expected less than {_core.BLOCK_STEPS}, got {state['open_steps']}")
    for key, number, most in (
        ("settled", state["settled"], written),
        ("recent.drained", recent["drained"], written),
        ("recent.absorbed", recent["absorbed"], seen),
    ):
        if number > most:
            raise ValueError(f"{key}: {number} steps, but there were {int(most)}")
