"""Where two runs part: the first step whose numbers are not the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipcore.report.source import Source

_STEPS = 256  # of a chunk
_RING = "flight/"  # of which a run keeps the last steps alone; the same numbers as of groups

#: Quantities that are told first where several differ: a learning rate is why updates differ.
_RANKS = {"logged/loss": 0, "optimizer/group_lr": 1}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Difference:
    """A number that two runs do not have in common."""

    quantity: str  #: full name: "trajectory/update_norm"
    place: str
    one: float
    other: float

    @property
    def relative(self) -> float:
        """Difference over the larger of the two; infinite where one is no finite number."""
        size = max(abs(self.one), abs(self.other))
        far = abs(self.one - self.other) / size if size > 0 else 0.0
        return far if np.isfinite(far) else np.inf


@dataclass(frozen=True)
class Parting:
    """Result of comparing two runs step by step.

    Attributes:
        steps: of how many steps both have numbers, up to the first difference.
        step: the first step that differs; None where none does.
        differences: at that step, the loss first, then learning rates, then the largest.
    """

    steps: int
    step: int | None
    differences: Sequence[Difference]


def parting(one: Source, other: Source) -> Parting:
    """Compare the single steps that two runs both have, number by number; folded steps are left out."""
    names = [name for name in other.step_quantities if not name.startswith(_RING)]
    shared = [name for name in one.step_quantities if name in names]
    first: int | None = None
    found: list[Difference] = []
    seen: set[int] = set()
    for quantity in shared:
        for start, places, mine, theirs, both in _together(one, other, quantity):
            if first is not None and start > first:
                break
            differ = both[:, None] & (mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs))
            rows = np.flatnonzero(differ.any(1))
            end = len(both) if not len(rows) else int(rows[0])
            seen.update((start + np.flatnonzero(both[:end])).tolist())
            if not len(rows):
                continue
            step = start + int(rows[0])
            if first is None or step < first:
                first, found = step, []
            if step == first:
                at = np.flatnonzero(differ[rows[0]]).tolist()
                found += [
                    Difference(quantity, places[i], float(mine[rows[0], i]), float(theirs[rows[0], i])) for i in at
                ]
            break
    if any(each.place != "total" for each in found):
        found = [each for each in found if each.place != "total" or each.quantity.startswith("logged/")]
    found.sort(key=lambda each: (_RANKS.get(each.quantity, len(_RANKS)), -each.relative))
    return Parting(len(seen) if first is None else len([step for step in seen if step < first]), first, found)


def _together(one: Source, other: Source, quantity: str) -> Iterator[tuple[int, list[str], Array, Array, Array]]:
    """Yield (first step, places, numbers of one, of the other, rows that both have) of chunks that both have."""
    theirs = _chunks(other, quantity)
    waiting = next(theirs, None)
    for start, names, values, there in _chunks(one, quantity):
        while waiting is not None and waiting[0] < start:
            waiting = next(theirs, None)
        if waiting is None:
            return
        if waiting[0] != start:
            continue
        _, other_names, other_values, other_there = waiting
        index = {name: i for i, name in enumerate(other_names)}
        common = [i for i, name in enumerate(names) if name in index]
        columns = [index[names[i]] for i in common]
        yield start, [names[i] for i in common], values[:, common], other_values[:, columns], there & other_there


def _chunks(run: Source, quantity: str) -> Iterator[tuple[int, list[str], Array, Array]]:
    """Yield (first step, places, numbers [256, places], rows that are there), in steps of 256, of single steps."""
    start, names = -1, [""]
    values, there = np.empty((0, 0)), np.zeros(0, bool)
    for block in run.blocks(quantity):
        if block.low is not block.values:
            continue
        at = 0
        while at < len(block.steps):
            chunk = int(block.steps[at]) // _STEPS * _STEPS
            if chunk != start or list(block.places) != names:
                if there.any():
                    yield start, names, values, there
                start, names = chunk, list(block.places)
                values, there = np.full((_STEPS, len(names)), np.nan), np.zeros(_STEPS, bool)
            end = min(len(block.steps), at + chunk + _STEPS - int(block.steps[at]))
            rows = slice(int(block.steps[at]) - chunk, int(block.steps[end - 1]) - chunk + 1)
            values[rows], there[rows] = block.values[at:end], True
            at = end
    if there.any():
        yield start, names, values, there
