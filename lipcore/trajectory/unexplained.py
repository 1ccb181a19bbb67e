"""Movement that the optimizer did not make: what a parameter did, against the step that its optimizer's state says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipcore import _core
from lipcore.functional.update_sums import MOMENTUM, UNEXPLAINED
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.trajectory.mean_ring import MeanRing
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.source_sums import Sums
from lipcore.trajectory.sources import OptimizerSource, supported_here
from lipcore.trajectory.table import Table

#: In half ulps of w and dw together: what a step may differ by from its formula. Measured by bench/movement_floor.py,
#: bench/results/movement-floor.json: the largest of all is a quarter of it or less.
LIMITS = {torch.float32: 32.0, torch.float64: 32.0, torch.bfloat16: 16.0}
#: Of parameters that are checked in turns: bytes of a share at the least, and about how many shares there are at most.
_SHARE, _TURNS = 16 << 20, 64


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
    r"""Check of every step: :math:`\|(w - w_{prev}) - dw\|` over what rounding may make of it,
    :math:`k u \sqrt{\|w\|^2 + \|dw\|^2}` (and the momentum's own part of Nesterov's dw), with dw from the optimizer's
    state, u half an ulp of 1 in the parameter's dtype, and k of :data:`LIMITS`. Over 1, something else than the
    optimizer has moved the parameter since the step before.

    Without `previous` the parameters take turns: in each step a share of them is checked, against copies that were made
    at the end of the step before and live until this one. So a cause that lasts is found, after :attr:`turns` steps at
    the latest, and one of a single step where it meets a parameter whose turn it is.

    Args:
        watched: the parameters of `table`.
        optimizers: those that were passed, of any kind.
        previous: copies of all that a tracker will replace by what the parameters are; None where none does.
    """

    def __init__(
        self,
        watched: Sequence[WatchedParameter],
        optimizers: Sequence[Any],
        previous: list[Tensor] | None,
        table: Table,
    ) -> None:
        found = checkable(watched, optimizers)
        self.why_not = found.why_not
        self._previous, self._watched, self._places = previous, watched, found.places
        sizes = [watched[i].tensor.nbytes for i in found.places]
        self._shares = [found.places] if previous is not None else shares_of(found.places, sizes)
        self.bytes = (
            0 if previous is not None else max((sum(map(self._size, each)) for each in self._shares), default=0)
        )
        self._names = [watched[i].name for i in found.places]
        self._sources = [self._source_of(found.optimizers, share) for share in self._shares if share]
        self._turn = 0
        self._copies: list[Tensor] | None = None  # of those whose turn it is
        self._over = False  # no step comes any more
        self._by_each = False  # optimizers' own steps were read one by one
        device = table.rows.device
        self._units_sq, self._index = [], []
        for share in self._shares:
            dtypes = [watched[i].tensor.dtype for i in share]
            units = [LIMITS[dtype] * torch.finfo(dtype).eps / 2 for dtype in dtypes]
            self._units_sq.append(torch.tensor(units, dtype=torch.float64, device=device).square())
            self._index.append(torch.tensor(share, dtype=torch.int64, device=device))
        self._scores = torch.full((len(watched), 2), torch.nan, dtype=torch.float64, device=device)
        self.ring = MeanRing(table)
        # With copies on the CPU the tracker that has them checks, in the pass in which it takes the step.
        self._core: _core.MovementCheck | None = None
        self._before = [] if previous is None else [previous[i] for i in found.places]
        if previous is not None and device.type == "cpu" and self._sources:
            self._core = _core.MovementCheck(self.ring.recent, found.places, self._units_sq[0].tolist())
        self.begin()

    def _size(self, place: int) -> int:
        return self._watched[place].tensor.nbytes

    def _source_of(self, optimizers: Sequence[Optimizer], share: Sequence[int]) -> OptimizerSource:
        chosen = [self._watched[i] for i in share]
        return OptimizerSource(optimizers, [(one.name, one.owner, one.key) for one in chosen])

    @property
    def checked(self) -> int:
        """Number of parameters that are checked."""
        return len(self._places) if self._sources else 0

    @property
    def turns(self) -> int:
        """Number of steps in which each parameter is checked once."""
        return max(1, len(self._shares))

    @property
    def rule(self) -> str:
        """Rule of the check, as a plan says it."""
        if self.turns == 1:
            return f"{self.checked} parameters checked in every step"
        turns = f"in turns, each in one step of {self.turns}, against copies that live for that step"
        return f"{self.checked} parameters checked {turns}: what lasts is found"

    def stop(self, why: str) -> None:
        """Check nothing from now on, and warn of it."""
        message = f"alarms: unexplained_movement checks nothing from now on: {why}"
        warn_in_hook(message, RuntimeWarning, stacklevel=6)
        self._sources, self._by_each, self._copies, self.bytes = [], False, None, 0
        self.why_not = self.why_not | dict.fromkeys(self._names, why)

    def end(self) -> None:
        """Let the copies go: no step comes any more."""
        self._over, self._copies, self._by_each = True, None, False

    def begin(self) -> None:
        """Check the next step from the parameters as they are now: they were set by something else than a step."""
        if self._previous is None and self._sources and not self._over:
            self._copies = None  # the old ones go before new ones come
            share = self._shares[self._turn]
            self._copies = [self._watched[i].tensor.detach().clone() for i in share if self._watched[i].there]

    def after_step_of(self, optimizer: Optimizer) -> None:
        """Take the step of one of several optimizers, in whose hook alone its gradients and verdict are there."""
        self._by_each = self._sums(optimizer) is not None

    def observe(self) -> _core.MovementCheck | None:
        """Take a step in, before the copies follow, or return the check for the tracker that has them to make with its
        step. Nothing waits for a device, and nothing is raised: a step that cannot be read any more ends the check."""
        by_each, self._by_each = self._by_each, False
        if not by_each and self._has_taken():
            return self._core
        sums = self._sums(None)
        if sums is None or self.turns > 1:
            self._scores.fill_(torch.nan)
        if sums is not None and self._sources:
            rows, squares = sums
            sizes = rows[:, 0] + rows[:, 3]
            for mix in self._sources[self._turn].mixes():
                sizes = sizes + squares[MOMENTUM].nan_to_num(0) * mix**2  # Nesterov's two terms may cancel
            found = torch.stack([squares[UNEXPLAINED], self._units_sq[self._turn] * sizes], dim=1)
            if len(found) == len(self._scores):
                self._scores = found
            else:
                self._scores.index_copy_(0, self._index[self._turn], found)
        self.ring.take(self._scores)
        self._turn = (self._turn + 1) % self.turns
        self.begin()
        return None

    def _has_taken(self) -> bool:
        """Hand the step to the compiled check; return False where that cannot be, for :meth:`_sums` to make copies of
        other layouts, or to say what is wrong."""
        if self._core is None or not self._sources:
            return False
        try:
            moves = self._sources[0].moves()
            if moves is None:
                return False
            self._core.take(*moves, self._before)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        return True

    def _sums(self, only: Optimizer | None) -> Sums | None:
        if not self._sources:
            return None
        previous = self._copies if self._previous is None else self._before
        source = self._sources[self._turn]
        try:
            return source.finish(previous=previous) if only is None else source.sums(only, previous=previous)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            self.stop(f"the optimizer's step could not be read: {error}")
            return None


def shares_of(places: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut parameters into shares, in their order, that have 16 MiB or a 64th of all bytes each, whichever is more; one
    that is larger is a share of its own.

    >>> shares_of([0, 1, 2, 3], [10 << 20, 6 << 20, 40 << 20, 1 << 20])
    [[0, 1], [2], [3]]
    """
    most = max(_SHARE, -(-sum(sizes) // _TURNS))
    found: list[list[int]] = []
    size = 0
    for place, own in zip(places, sizes, strict=True):
        if not found or size + own > most:
            found.append([])
            size = 0
        found[-1].append(place)
        size += own
    return found
