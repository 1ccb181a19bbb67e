"""Checks of a saved state against what is expected, before anything is taken over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.state import MOST
from lipcore.trajectory.table import COLUMN, COLUMNS, POINTS

_COUNTS = [i for i, name in enumerate(COLUMNS) if name.endswith("steps") or name == "nonfinite_elements"]


def check_counters(state: dict[str, Any], rows: Tensor, group: int) -> None:
    """Raise ValueError when what the core uses as an index, or the counts of steps, could not be those of a ledger."""
    given = state["rows"]
    if not bool((given[:, group] == rows[:, group].cpu().to(given.device)).all()):
        raise ValueError("rows: the groups of its tensors are others than here")
    _check_rows(given)
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


def _check_rows(rows: Tensor) -> None:
    """Raise ValueError when a ledger could not have come to hold these numbers."""
    least = torch.zeros(len(COLUMNS), dtype=rows.dtype, device=rows.device)
    least[POINTS] = _core.CONTINUES
    may_be_unknown = torch.zeros_like(least, dtype=torch.bool)
    may_be_unknown[COLUMN["total_path"]] = True  # of parts that other ranks had before
    for column, wrong in (
        ("", (rows.isnan() & ~may_be_unknown) | (rows < least)),
        ("steps", (rows[:, _COUNTS] != rows[:, _COUNTS].floor()) | (rows[:, _COUNTS] > MOST)),
    ):
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            name = COLUMNS[_COUNTS[place]] if column else COLUMNS[place]
            value = float(rows[row, COLUMN[name]])
            raise ValueError(f"rows[{row}]: {name} is {value}, which no ledger holds")
