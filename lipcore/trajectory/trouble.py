"""Warnings of what a Trajectory's numbers would otherwise lack, or have as zero, without a word."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lipcore.trajectory.gradient_norms import Gradients
from lipcore.trajectory.inventory import Inventory
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.table import COLUMN
from lipcore.trajectory.tracker import Tracker

_HALF = (torch.bfloat16, torch.float16)


class Trouble:
    """Warnings of one Trajectory, each given once per parameter."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._inventory: Inventory | None = None
        self._half: list[WatchedParameter] = []  # of the inventory's parameters: those to be looked at
        self._of: list[WatchedParameter] | None = None

    def forget(self) -> None:
        """Warn anew of what was warned of already."""
        self._warned.clear()

    def look(self, model: Any, watched: list[WatchedParameter], tracker: Tracker, gradients: Gradients | None) -> None:
        """Warn of parameters that are not watched, steps without a gradient, and half precision that never moves."""
        if self._of is not watched:
            self._bind(model, watched)
        if self._inventory is not None:
            for name in self._inventory.unwatched():
                self._warn(
                    name,
                    f"parameter '{name}' is trainable but was not when this Trajectory was bound (added, unfrozen or "
                    "untied since?), so it is not in its numbers; call rebind()",
                )
        if gradients and gradients.missed:
            self._warn(
                "grad_norm",
                f"grad_norm lacks {gradients.missed} steps: no backward pass was seen before them. Call "
                "observe_gradients() after backward, or rebind() where a Monitor does and parameters were replaced",
            )
        for stage, why in gradients.unknown.items() if gradients else ():
            self._warn(f"{stage} unknown", f"{stage} lacks steps: {why}")
        rows = tracker.named_rows() if self._half else {}
        for parameter in self._half:
            shadow = parameter.tensor if parameter.shadow is None else parameter.shadow
            row = rows.get((parameter.name, "tensor"))
            steps = 0 if row is None else _steps_without_moving(row.tolist())
            if parameter.shadow is None and steps >= 10:
                self._warn(
                    parameter.name,
                    f"parameter '{parameter.name}' is {str(shadow.dtype)[6:]} and did not move in {steps} steps: "
                    "updates below its resolution are lost. If an optimizer keeps float32 master copies, pass masters=",
                )
            elif parameter.shadow is not None and not torch.equal(
                parameter.tensor.detach().to(shadow.dtype), shadow.detach()
            ):
                self._warn(parameter.name, f"parameter '{parameter.name}' does not hold the values of its master copy")

    def _bind(self, model: Any, watched: list[WatchedParameter]) -> None:
        """Keep what stays the same as long as the same parameters are watched; their dtypes do."""
        self._of = watched
        self._inventory = Inventory(model, watched) if isinstance(model, nn.Module) else None
        self._half = [parameter for parameter in watched if parameter.dtype in _HALF]

    def _warn(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(f"trajectory: {message}", UserWarning, stacklevel=4)


def _steps_without_moving(row: list[float]) -> int:
    """Return for how many steps a tensor has not moved: in the window, or since the reference, since windows may be
    short."""
    steps, still, total = (int(row[COLUMN[c]]) for c in ("steps", "zero_steps", "total_steps"))
    since_reference = total if row[COLUMN["total_path"]] == 0 else 0
    return max(since_reference, steps if steps == still else 0)
