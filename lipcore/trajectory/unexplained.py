"""Movement that the optimizer did not make: what a parameter did, against the step that its optimizer's state says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipcore.functional.update_sums import MOMENTUM, UNEXPLAINED
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.trajectory.mean_ring import MeanRing
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.sources import OptimizerSource, Sums, supported_here
from lipcore.trajectory.table import Table

#: In half ulps of w and dw together: what a step may differ by from its formula. Measured by bench/movement_floor.py,
#: bench/results/movement-floor.json: the largest of all is a quarter of it or less.
LIMITS = {torch.float32: 32.0, torch.float64: 32.0, torch.bfloat16: 16.0}


@dataclass(frozen=True)
class Checked:
    """Which parameters are checked, and why others are not."""

    places: list[int]
    optimizers: list[Optimizer]
    why_not: dict[str, str]  #: by parameter


def checkable(watched: Sequence[WatchedParameter], optimizers: Sequence[Any]) -> Checked:
    """Tell the parameters whose optimizer's step is known to the last digits."""
    why, owners = {}, {}
    for optimizer in optimizers:
        reason = supported_here(optimizer)
        for group in getattr(optimizer, "param_groups", ()):
            for tensor in group["params"]:
                if id(tensor) in owners:
                    reason = "it is in two optimizers"
                owners[id(tensor)] = (optimizer, reason)
    places = []
    for i, parameter in enumerate(watched):
        own = parameter.owner[parameter.key]
        optimizer, reason = owners.get(id(own), (None, "no optimizer that was passed has it"))
        if reason is None and type(own).__name__ == "DTensor":
            reason = "it is sharded"
        if reason is None and own.dtype not in LIMITS:
            reason = f"{str(own.dtype)[6:]} was not measured"
        if reason is None:
            places.append(i)
        else:
            why[parameter.name] = reason
    used = {id(owners[id(watched[i].owner[watched[i].key])][0]) for i in places}
    return Checked(places, [optimizer for optimizer in optimizers if id(optimizer) in used], why)


class Unexplained:
    r"""Check of every step of exact copies: :math:`\|(w - w_{prev}) - dw\|` over what rounding may make of it,
    :math:`k u \sqrt{\|w\|^2 + \|dw\|^2}` (and the momentum's own part of Nesterov's dw), with dw from the optimizer's
    state, u half an ulp of 1 in the parameter's dtype, and k of :data:`LIMITS`. Over 1, something else than the
    optimizer has moved the parameter since the step before.

    Args:
        watched: the parameters of `table`, with `previous`, the copies that its tracker will replace by what they are.
        optimizers: those that were passed, of any kind.
    """

    def __init__(
        self,
        watched: Sequence[WatchedParameter],
        optimizers: Sequence[Any],
        previous: list[Tensor],
        table: Table,
    ) -> None:
        found = checkable(watched, optimizers)
        self.why_not = found.why_not
        self._previous, self._places = previous, found.places
        chosen = [watched[i] for i in found.places]
        named = [(one.name, one.owner, one.key) for one in chosen]
        self._names = [one.name for one in chosen]
        self._source = OptimizerSource(found.optimizers, named) if chosen else None
        self._each: Sums | None = None
        units = [LIMITS[one.tensor.dtype] * torch.finfo(one.tensor.dtype).eps / 2 for one in chosen]
        device = table.rows.device
        self._units_sq = torch.tensor(units, dtype=torch.float64, device=device).square()
        self._index = torch.tensor(found.places, dtype=torch.int64, device=device)
        self._scores = torch.full((len(watched), 2), torch.nan, dtype=torch.float64, device=device)
        self.ring = MeanRing(table)

    @property
    def checked(self) -> int:
        """Number of parameters that are checked."""
        return len(self._places) if self._source is not None else 0

    def stop(self, why: str) -> None:
        """Check nothing from now on, and warn of it."""
        message = f"alarms: unexplained_movement checks nothing from now on: {why}"
        warn_in_hook(message, RuntimeWarning, stacklevel=6)
        self._source, self._each = None, None
        self.why_not = self.why_not | dict.fromkeys(self._names, why)

    def after_step_of(self, optimizer: Optimizer) -> None:
        """Take the step of one of several optimizers, in whose hook alone its gradients and verdict are there."""
        self._each = self._sums(optimizer)

    def observe(self) -> None:
        """Take a step in, before the copies follow. Nothing waits for a device, and nothing is raised: a step that
        cannot be read any more ends the check."""
        each, self._each = self._each, None
        sums = each or self._sums(None)
        if sums is None:
            self._scores.fill_(torch.nan)
        else:
            rows, squares = sums
            sizes = rows[:, 0] + rows[:, 4]
            for mix in self._source.mixes() if self._source is not None else ():
                sizes = sizes + squares[MOMENTUM].nan_to_num(0) * mix**2  # Nesterov's two terms may cancel
            found = torch.stack([squares[UNEXPLAINED], self._units_sq * sizes], dim=1)
            if len(found) == len(self._scores):
                self._scores = found
            else:
                self._scores.index_copy_(0, self._index, found)
        self.ring.take(self._scores)

    def _sums(self, only: Optimizer | None) -> Sums | None:
        if self._source is None:
            return None
        try:
            return self._source.sums(only=only, previous=[self._previous[i] for i in self._places])
        except (TypeError, ValueError, RuntimeError) as error:
            self.stop(f"the optimizer's step could not be read: {error}")
            return None
