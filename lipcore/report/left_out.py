"""Steps in which a parameter of a group was not finite: what is recorded of the group is of its other parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lipcore.report.source import Block, Source

#: Numbers of parameters that were left out, by group and in total, of the steps in which there were any.
NOT_FINITE = "trajectory/not_finite"
_OF = ("trajectory/update_norm", "trajectory/weight_norm")


class LeftOut:
    """Steps, by place, in which the numbers of a group are not those of all its parameters."""

    def __init__(self) -> None:
        self.steps: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}

    @classmethod
    def of(cls, run: Source, first: int = 1, last: int | None = None) -> LeftOut:
        """Read them from a run."""
        found = cls()
        if NOT_FINITE in run.step_quantities:
            for block in run.blocks(NOT_FINITE, first, last):
                for place, column in zip(block.places, block.high.T, strict=True):
                    before = found.steps.get(place, np.empty(0, np.int64))
                    found.steps[place] = np.concatenate([before, block.steps[column > 0]])
        return found

    def blocks(self, run: Source, quantity: str, first: int = 1, last: int | None = None) -> Iterator[Block]:
        """Yield the single steps of a quantity, NaN where those of a place are not of all its parameters."""
        for block in run.blocks(quantity, first, last):
            yield self._masked(block) if self.steps and quantity in _OF else block

    def _masked(self, block: Block) -> Block:
        if block.low is not block.values:  # 64 steps each: some of them are finite
            return block
        values = block.values
        for column, place in enumerate(block.places):
            rows = np.isin(block.steps, self.steps.get(place, ()))
            if rows.any():
                values = values.copy() if values is block.values else values
                values[rows, column] = np.nan
        return block if values is block.values else Block(block.steps, block.places, block.levels, *[values] * 3)

    @property
    def first(self) -> tuple[int, str] | None:
        """The first such step and the group; None where there is none."""
        found = [(int(steps.min()), place) for place, steps in self.steps.items() if len(steps) and place != "total"]
        return min(found, default=None)

    @property
    def count(self) -> int:
        """Number of such steps."""
        return len(np.unique(np.concatenate(list(self.steps.values())))) if self.steps else 0
