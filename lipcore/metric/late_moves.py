"""Notices weights that move when no step was counted: after the optimizer's own step, or without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.host_copy import HostCopy
from lipcore.models.torch_internals import foreach_norm

_ALWAYS = 24  # steps that are all looked at: a Lookahead's slow weights move at every fifth or tenth one
_SOMETIMES = 100  # of the others one in so many
_RELATIVE = 2e-7  # of the sums; a wrapper that moves weights there and back (eval(), train()) leaves rounding errors
_PATIENCE = 4  # backward passes without a step; then at every power of two


class LateMoves:
    """Compares the weights at a step's end, and before the first step, with those that the next backward pass finds.

    Sums of squares are compared, so one reading of the weights is made at each end. What a device finds is looked at
    when a later comparison is due and it is there: no step waits for it.

    Args:
        parameters: the trainable ones, as they are now.
        after_step: called at the beginning of a backward pass when the weights moved after a step was over.
        without_step: called there, once, when they moved over several backward passes and no step was ever counted.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        after_step: Callable[[], None],
        without_step: Callable[[], None],
    ) -> None:
        self._parameters = parameters
        self._after_step, self._without_step = after_step, without_step
        self._mark: Reading | None = None  # of the weights at the end of a step
        self._first: Reading | None = None  # of the weights before the first step
        self._moved: HostCopy | None = None  # a comparison that a device makes
        self._steps = self._passes = 0
        self._suspected = False  # at the last look the weights had moved without a step
        self.done = False  #: nothing more is looked for

    def step(self, *, compare: bool) -> None:
        """Note that a step was counted, and is over; `compare`: the weights are to stay where they are from here on."""
        self._steps += 1
        if self._first is not None:
            self._first = self._moved = None
        if self.done or not compare:
            return
        if self._steps <= _ALWAYS or self._steps * 2654435761 % 2**32 < 2**32 // _SOMETIMES:
            self._mark = self._sums()

    def forget(self) -> None:
        """Note that something that is known of has changed the weights (a state was loaded)."""
        self._mark = self._moved = self._first = None
        self._passes = 0

    def step_begins(self) -> None:
        """Compare, where that is due and no backward pass has come since the last step (all run inside closures)."""
        mark, self._mark = self._mark, None
        if mark is not None and self._differs(mark):
            self.done = True
            self._after_step()

    def backward_begins(self) -> None:
        """Compare, where that is due. Not for backward passes inside a step: a closure's run at weights of its own."""
        if self._mark is not None:
            self.step_begins()
        elif not self._steps and not self.done:
            self._look_for_a_step()

    def _look_for_a_step(self) -> None:
        self._passes += 1
        if self._passes == 1:
            self._first = self._sums()
        elif self._first is not None and self._passes >= _PATIENCE and self._passes & (self._passes - 1) == 0:
            now = self._sums()
            moved = now is not None and self._known(now.moved_from(self._first))
            self.done = moved and self._suspected  # twice, since SAM's first steps come before the first step
            self._suspected = moved
            if self.done:
                self._without_step()

    def _differs(self, mark: Reading) -> bool:
        now = self._sums()
        return now is not None and self._known(now.moved_from(mark))

    def _known(self, moved: Tensor) -> bool:
        """Return a comparison's answer; on a device that of an earlier one, where it is there."""
        if moved.is_cpu:
            return bool(moved)
        earlier = self._moved
        if earlier is not None and not earlier.is_there:
            return False
        self._moved = HostCopy(moved)
        return earlier is not None and bool(earlier.tensors()[0])

    @torch.no_grad()
    def _sums(self) -> Reading | None:
        """Read every parameter; None where a parameter's memory is not its own (shards)."""
        parameters = list(self._parameters())
        found = [parameter.detach() for parameter in parameters]
        ids = tuple(map(id, parameters))
        if not found or any(_is_foreign(parameter) for parameter in found):
            return None
        if all(parameter.is_cpu for parameter in found):
            rows = torch.empty(len(found), _core.STEP_COLUMNS, dtype=torch.float64, device="cpu")
            _core.square_sums(found, rows)
            return Reading(ids, rows[:, 0])
        return Reading(ids, torch.stack(foreach_norm(found)).double())


@dataclass
class Reading:
    """Sums of squares (or norms) of parameters, and which they are: ids of objects that are alive."""

    of: tuple[int, ...]
    sums: Tensor

    def moved_from(self, earlier: Reading) -> Tensor:
        """Return whether a parameter that is the same object has other values. Values that are not finite are left out:
        a loop may put back what was there before."""
        if self.of == earlier.of:
            now, before = self.sums, earlier.sums
        else:
            places = {one: i for i, one in enumerate(earlier.of)}
            both = [(i, places[one]) for i, one in enumerate(self.of) if one in places]
            now, before = self.sums[[i for i, _ in both]], earlier.sums[[j for _, j in both]]
        moved = (now - before).abs() > _RELATIVE * before.abs()
        return (moved & now.isfinite() & before.isfinite()).any()


def _is_foreign(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and parameter.layout == torch.strided
    return not plain or parameter.untyped_storage().nbytes() == 0 or parameter.dtype.is_complex
