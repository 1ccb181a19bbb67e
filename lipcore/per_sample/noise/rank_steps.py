"""What one rank knows of the steps of a window, of whose gradients its samples are a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.metric.state import checked_tensor, is_count

#: As many steps of a window are kept; a step is a few numbers per layer and per parameter.
MOST = 4096
_TOO_MANY = f"the window has more than {MOST} recorded steps, of which no more are kept; use shorter windows"
NOTHING = -1  # in place of a reason: the rank has recorded nothing in this step


@dataclass
class StepSums:
    """Sums of one optimizer step on one rank.

    Attributes:
        squares: [places], sums of ||grad l_i||^2 over its samples; None where it has none.
        samples: how many.
        weight: what the gradient holds of a sample's: w for the gradient sum of w grad l_i over all ranks, 1 / f.
        gradient: squared norms [parameters] of what this rank holds of the gradient; None where it was not found.
        same: whether all of its samples have this weight, where only the device knows.
        wrong: why the gradient is not that sum.
    """

    squares: Tensor | None
    samples: int
    weight: float | Tensor
    gradient: Tensor | None
    same: Tensor | None
    wrong: str


@dataclass
class StepTable:
    """The steps of a window on one rank, float64 on the CPU.

    Attributes:
        squares: [steps, places].
        gradients: [steps, parameters].
        samples, weights: [steps].
        codes: [steps], 0 for a step that counts, else 1 + the number of a reason, or NOTHING.
        reasons: why steps are left out.
    """

    squares: Tensor
    gradients: Tensor
    samples: Tensor
    weights: Tensor
    codes: Tensor
    reasons: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.squares.nbytes + self.gradients.nbytes


class RankSteps:
    """Keeper of the steps of a window.

    Args:
        places: layers, and the total.
        parameters: how many squared norms a gradient has.
        unequal: the reason for a step whose samples have several weights.
    """

    def __init__(self, places: int, parameters: int, unequal: str) -> None:
        self._places, self._parameters, self._unequal = places, parameters, unequal
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._steps: list[StepSums | None] = []
        self._proved = 0
        self.off = ""  #: why these are not all steps of the window

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: StepSums | None) -> None:
        """Add a step; None for one in which nothing was recorded."""
        if len(self._steps) >= MOST:
            self.off = _TOO_MANY
            return
        self._steps.append(step)

    def mark(self) -> None:
        """Note that everything so far is right."""
        self._proved = len(self._steps)

    def take_back(self, reason: str) -> None:
        """Leave out what has come since the last mark."""
        for i in range(self._proved, len(self._steps)):
            self._steps[i] = StepSums(None, 0, 1.0, None, None, reason)
        self.mark()

    def state_dict(self) -> dict[str, Any]:
        """Return the steps, how many of them are proved, and why some are missing. Waits for the device."""
        return {**vars(self.table()), "proved": self._proved, "off": self.off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that was checked; where it is of other parameters, they are not all steps."""
        self.reset()
        if state["gradients"].shape[1] != self._parameters:
            self.off = "the window began before a state was loaded, of other parameters"
            return
        for squares, gradient, samples, weight, code in zip(
            state["squares"], state["gradients"], state["samples"], state["weights"].tolist(), state["codes"],
            strict=True,
        ):  # fmt: skip
            why = state["reasons"][int(code) - 1] if code > 0 else ""
            here = StepSums(squares, int(samples), weight, gradient, None, why)
            self._steps.append(None if code == NOTHING else here)
        self._proved, self.off = state["proved"], state["off"]

    def table(self) -> StepTable:
        """Return the steps. Waits for the device."""
        squares, gradients = (
            _stacked([None if step is None else getattr(step, name) for step in self._steps], length)
            for name, length in (("squares", self._places), ("gradient", self._parameters))
        )
        weights = _stacked([None if s is None else _one(s.weight) for s in self._steps], 1)[:, 0]
        same = _stacked([None if s is None or s.same is None else ~s.same.reshape(1) for s in self._steps], 1)[:, 0]
        reasons: list[str] = []
        codes = []
        for step, differs in zip(self._steps, same.tolist(), strict=True):
            why = "" if step is None else step.wrong or (self._unequal if differs else "")
            if why and why not in reasons:
                reasons.append(why)
            codes.append(NOTHING if step is None else 1 + reasons.index(why) if why else 0)
        samples = [0 if step is None else step.samples for step in self._steps]
        weights = torch.where(weights.isfinite(), weights, 0.0)  # f of a micro-batch without samples is 0
        numbers = [torch.tensor(each, dtype=torch.float64, device="cpu") for each in (samples, codes)]
        return StepTable(squares, gradients, numbers[0], weights, numbers[1], reasons)


def checked_table(state: Any, places: int) -> None:
    """Raise ValueError where what :meth:`RankSteps.state_dict` gives is none of so many places."""
    if not isinstance(state, dict):
        raise ValueError(f"steps: expected a dict, got {type(state).__name__}")
    codes = checked_tensor("steps.codes", state.get("codes"), torch.float64, (None,))
    count = len(codes)
    for key, shape in (("squares", (count, places)), ("gradients", (count, None)), ("samples", (count,)),
                       ("weights", (count,))):  # fmt: skip
        checked_tensor(f"steps.{key}", state.get(key), torch.float64, shape)
    reasons, proved = state.get("reasons"), state.get("proved")
    known = isinstance(reasons, list) and bool((codes <= len(reasons)).all()) and isinstance(state.get("off"), str)
    if not known or not is_count(proved) or int(proved or 0) > count:
        raise ValueError(f"steps.reasons: expected those of {count} steps, got {reasons!r:.80}")


def _one(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(1)
    return torch.tensor([value], dtype=torch.float64, device="cpu")


def _stacked(rows: Sequence[Tensor | None], length: int) -> Tensor:
    """Return rows as float64 on the CPU, one transfer per device; zeros for those that are not there."""
    out = torch.zeros(len(rows), length, dtype=torch.float64, device="cpu")
    where: dict[torch.device, list[int]] = {}
    for i, row in enumerate(rows):
        if row is not None:
            where.setdefault(row.device, []).append(i)
    for indices in where.values():
        out[indices] = torch.stack([rows[i] for i in indices]).double().cpu()  # type: ignore[misc]
    return out
