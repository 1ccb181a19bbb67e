"""Single steps handed to a callback in blocks, as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore import _core
from lipcore.metric.columns import Places
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.host_copy import HostCopy
from lipcore.metric.pace import Pace
from lipcore.trajectory.mean_ring import quotients
from lipcore.trajectory.table import Table

#: What a ring holds of a step, and the quantities made of it.
STEP_QUANTITIES = ("update_norm", "weight_norm", "grad_norm", "clipped_grad_norm")
#: What one holds besides, where it was asked for: a sum of squares, and what its mean is taken over.
MEANS = ("rms_t", "normalized_update_rms", "unexplained_movement")
BLOCK = 64
_DEVICE_BLOCK = 256  # a copy from a device is in flight while the next block is made, and a ring has 512 steps


class StepArrays(dict[str, NDArray[np.float64]]):
    """Arrays [steps, places] by quantity: update_norm, weight_norm (after the step), grad_norm, clipped_grad_norm. NaN
    where a step has none. And rms_t where the Trajectory has it, normalized_update_rms where alarms look at it."""

    def __init__(self, places: Places, arrays: Mapping[str, NDArray[np.float64]], groups: Sequence[str] = ()) -> None:
        super().__init__(arrays)
        self.groups = groups  #: group of each column of a parameter, which stand before the others
        self.places = list(places.names)  #: what the columns are of
        self.levels = list(places.levels)  #: whether each is a parameter ("tensor"), a "group" or the "total"


OnStep = Callable[[int, StepArrays], object]


class StepStream:
    """Stream of every step of some rings, each handed over once and in order. Nothing is raised where a step is
    observed.

    Args:
        calls: each gets the number of the first step, and the arrays; they are not to change them.
        places: what the last rows of the tables are of.
        table: with update and weight norms; `rings` with other quantities, at the same steps.
        before: called before rings are read.
        fail: gets a callback and what it raised, after which it is not called any more.
        first: the number of the first step in the rings.
        seconds: how long a step waits at most until it is handed over, on a device one more step; None: for a block.
        groups: of the parameters among the places.
    """

    def __init__(
        self,
        calls: Sequence[OnStep],
        places: Places,
        table: Table,
        rings: Mapping[str, Tensor],
        before: Callable[[], None],
        fail: Callable[[OnStep, Exception], None],
        first: int = 1,
        seconds: float | None = None,
        groups: Sequence[str] = (),
    ) -> None:
        self._calls, self._groups = list(calls), groups
        self._places, self._first, self._before, self._fail = places, first, before, fail
        self._table, self._cursor = table, table.cursor
        self._rings = {"update_norm": table.recent, **rings}
        self._done = int(self._cursor[0])
        self._waiting = 0
        self._prompt = seconds is not None
        self._pace = Pace(BLOCK if self._cursor.is_cpu else _DEVICE_BLOCK, seconds)
        self._copied: HostCopy | None = None
        self._whole = not self._prompt  # the copy is of whole rings, not of the last steps alone

    def step(self) -> None:
        """Count a step, and hand over a block when there are enough."""
        self._waiting += 1
        if not self._calls:
            return
        if (self._prompt or self._pace.hurries) and self._copied is not None and self._copied.is_there:
            self._take_copied()
        free = self._copied is None or self._waiting >= self._pace.block
        if free and self._pace.is_due(self._waiting):
            self._before()
            if self._cursor.is_cpu:
                self._hand_over(self._rings, int(self._cursor[0]))
            else:
                self._take_copied()
                self._copy(self._waiting)
            self._waiting = 0

    def hurry(self) -> None:
        """Hand over what waits at the next two steps, however little it is; no device is waited for."""
        self._pace.hurry()

    def flush(self) -> None:
        """Hand over all steps so far. Waits for a device."""
        self._waiting = 0
        if not self._calls:
            return
        self._before()
        self._take_copied()
        self._hand_over({name: ring.cpu() for name, ring in self._rings.items()}, int(self._cursor[0]))

    def skip(self) -> None:
        """Pass over the steps in the rings: they are not this training's, or were handed over already."""
        self._copied, self._waiting = None, 0
        self._done = int(self._cursor[0])

    def _copy(self, steps: int) -> None:
        rings = list(self._rings.values())
        if not self._whole and steps < len(rings[0]):
            # Where they are is known on the device alone: replays of CUDA graphs make steps of which nobody tells.
            last = torch.arange(-steps, 0, device=self._cursor.device)
            index = last.add(self._cursor[0]).remainder_(len(rings[0])).long()
            rings = [ring.index_select(0, index) for ring in rings]
        self._copied = HostCopy(self._cursor, *rings)

    def _take_copied(self) -> None:
        if self._copied is None:
            return
        (cursor, *rings), self._copied = self._copied.tensors(), None  # of a block ago
        end = int(cursor[0])
        whole = len(rings[0]) == len(self._rings["update_norm"])
        if not whole and end - len(rings[0]) > self._done:
            self._whole = True  # there were more steps than one knew of: the next copy has them
            return
        self._whole = not self._prompt
        self._hand_over(dict(zip(self._rings, rings, strict=True)), end, whole=whole)

    def _hand_over(self, rings: Mapping[str, Tensor], end: int, *, whole: bool = True) -> None:
        """Hand over the steps up to number `end`; rings that are not whole have the last steps alone, in order."""
        length = len(rings["update_norm"])
        begin = max(self._done, end - length)  # steps of replayed CUDA graphs may be lost
        self._done = end
        if end <= begin or not self._calls:
            return
        shift = 0 if whole else end - length
        shape = len(STEP_QUANTITIES), end - begin, len(self._places)
        unknown = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        found = dict(zip(STEP_QUANTITIES, unknown.unbind(0), strict=True))
        arrays = StepArrays(self._places, dict(zip(STEP_QUANTITIES, unknown.numpy(), strict=True)), self._groups)
        for name, ring in rings.items():
            if name in MEANS:
                arrays[name] = quotients(ring, begin - shift, end - shift, self._table).numpy()
            else:
                second = found["weight_norm"] if name == "update_norm" else None
                _core.step_norms(ring, begin - shift, end - shift, found[name], second)
        for call in list(self._calls):
            try:
                call(self._first + begin, arrays)
            except Exception as error:  # noqa: PERF203
                self._calls.remove(call)
                self._fail(call, error)
                message = f"trajectory: on_step raised {type(error).__name__}: {error}; it is not called any more"
                warn_in_hook(message, RuntimeWarning, stacklevel=5)


def checked_callback(on_step: Any) -> OnStep | None:
    """Return the argument `on_step`; TypeError when it cannot be called."""
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step: expected a callable (first_step, arrays) or None, got {type(on_step).__name__}")
    return on_step  # type: ignore[no-any-return]
