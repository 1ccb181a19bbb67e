"""What a loop has logged on one rank, for the windows of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lipcore.distributed.contribution import Sizes
from lipcore.distributed.packed import Packed, Together
from lipcore.metric.later import Later
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import MetricResult
from lipcore.metric.values import Value

_COUNT, _SUM, _LOST, _LASTS, _LAST = range(5)  # columns of sums


def note_of(first: int, last: int) -> str:
    """Return what a window says whose numbers are not those of its steps."""
    return f"logged at steps {first} to {last}; log before optimizer.step() for those of the window"


def values_of(
    mean: float, low: float, high: float, count: int, lost: int, last: tuple[float, int], note: str, note_of_last: str
) -> dict[str, Value]:
    """Return the reducers of so many finite numbers, beside which so many that are not finite were left out; `last`:
    the number, and of how many it is the mean."""
    note = "; ".join([note] * bool(note) + [f"{lost} that are not finite are left out"] * bool(lost))
    found = {"mean": mean, "min": low, "max": high} if count else dict.fromkeys(("mean", "min", "max"), math.nan)
    reducers = {name: Value(float(number), count, "exact", count > 0, note) for name, number in found.items()}
    return reducers | {"last": Value(last[0], last[1], "exact", math.isfinite(last[0]), note_of_last)}


@dataclass
class LoggedPart(RankPart):
    """The numbers of one rank, by name, in a window. The mean is that of all calls on all ranks, min and max are over
    them, and last is the mean of what each rank has logged last; a name that some ranks alone have logged is theirs.

    Attributes:
        names: of the numbers, in their order.
        read: the numbers.
        steps: the first and the last of which there are some; [] where nothing was logged.
        late: they are not those of the window's steps.
    """

    names: list[str]
    read: Later[NDArray[np.float64]]
    steps: list[int]
    late: bool
    agreed: dict[str, Any] = field(default_factory=dict)
    holding: Holding | None = None
    _ranks: tuple[int, ...] = ()
    _by: dict[str, list[int]] = field(default_factory=dict)  # the ranks that have logged a name
    _heard: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return 8 * len(self.names)

    @property
    def told(self) -> dict[str, Any]:
        """Names and steps on this rank."""
        return {"names": list(dict.fromkeys(self.names)), "steps": self.steps, "late": self.late}

    def turn_to(self, ranks: tuple[int, ...]) -> None:
        """Speak of the ranks of this group from now on."""
        self._ranks = ranks

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take the names that all ranks have logged."""
        self._heard = [each for each in told if each["steps"]]
        self._by = {}
        for rank, each in zip(self._ranks, told, strict=True):
            for name in each["names"]:
                self._by.setdefault(name, []).append(rank)

    def sizes(self) -> Sizes:
        """Return how many numbers there are, by the names."""
        return Sizes(2 * len(self._by), lambda _: 5 * len(self._by))

    def packed(self) -> Packed:
        """Return counts, sums and extremes by name. Waits for the device."""
        numbers = self.read.get()
        largest = torch.full((len(self._by), 2), -torch.inf, dtype=torch.float64, device="cpu")
        sums = torch.zeros(len(self._by), 5, dtype=torch.float64, device="cpu")
        for i, name in enumerate(self._by):
            own = numbers[[k for k, other in enumerate(self.names) if other == name]]
            finite = own[np.isfinite(own)]
            if len(finite):
                largest[i] = torch.tensor([finite.max(), -finite.min()], dtype=torch.float64, device="cpu")
            if len(own):
                row = [len(finite), finite.sum(), len(own) - len(finite), own[-1], 1]
                sums[i] = torch.tensor(row, dtype=torch.float64, device="cpu")
        return Packed([sums], [largest])

    def result(self, together: Together) -> MetricResult | None:
        """Return the numbers of all ranks; None where no rank has logged any."""
        if not self._heard:
            return None
        steps = [step for each in self._heard for step in each["steps"]]
        first, last = min(steps), max(steps)
        result = MetricResult("logged", steps=[first, last])
        late = note_of(first, last) if any(each["late"] for each in self._heard) else ""
        for (name, ranks), row, (high, low) in zip(
            self._by.items(), together.sums[0].tolist(), together.largest[0].tolist(), strict=True
        ):
            alone = f"logged by rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} alone"
            notes = [alone] if len(ranks) < len(self._ranks) else []
            count, lost = int(row[_COUNT]), int(row[_LOST])
            mean = min(max(row[_SUM] / count, -low), high) if count else math.nan  # of equal numbers it is that number
            last_number = row[_LASTS] / row[_LAST], int(row[_LAST])
            note = "; ".join([*notes, *[late] * bool(late)])
            result.add(
                name, "total", "total", **values_of(mean, -low, high, count, lost, last_number, note, "".join(notes))
            )
            if notes:
                result.details.setdefault("logged_by", {})[name] = ranks
        return result
