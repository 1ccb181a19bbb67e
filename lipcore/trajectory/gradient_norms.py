"""Norms of the batch's gradient, before and after clipping, per tensor, group and in total."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipcore import _core
from lipcore.distributed.gradient_parts import gradient_part, why_not_known
from lipcore.metric.protocol import TAKEN
from lipcore.metric.results import MetricResult
from lipcore.models.device_index import DeviceIndices
from lipcore.trajectory.describe import GRADIENTS
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.table import COLUMN
from lipcore.trajectory.tracker import Tracker

BEFORE, USED = GRADIENTS


class GradientTracker(Tracker):
    """Tracker of the norms of gradients. Its ring has an entry for every step that the parameters' Tracker has seen:
    NaN where there was no gradient."""

    def __init__(self, watched: list[WatchedParameter], ring: int, window_blocks: int, steps: Tracker) -> None:
        super().__init__(watched, ring=ring, window_blocks=window_blocks, copies=False)
        self._steps = steps
        self._behind = 0  # steps without a gradient that are not in the ring yet

    def observe_nothing(self) -> None:
        """Count a step that had no gradient."""
        self._behind += 1

    def observe(self, sums: Tensor) -> bool:
        if self._behind:
            self.catch_up()
        return super().observe(sums)

    def catch_up(self) -> None:
        """Bring the ring to the parameters' last step. Nothing waits for a device."""
        steps, self._behind = self._behind, 0
        if steps:
            self.settle()  # what is in the ring joins the quantiles before it is overwritten
            recent = self.table.recent
            index = torch.arange(min(steps, len(recent)), device=recent.device) + self.table.cursor[0].long()
            recent.index_fill_(0, (index + max(0, steps - len(recent))) % len(recent), torch.nan)
            self._skip(steps)

    @property
    def has_steps(self) -> bool:
        """True when there was a step with a gradient."""
        rows = self.table.rows if self.closed else self.known_rows()
        total, nonfinite = (rows[:, COLUMN[column]].any() for column in ("total_steps", "nonfinite_steps"))
        return bool(total | nonfinite)

    def state_dict(self) -> dict[str, Any]:
        self.catch_up()
        return super().state_dict()

    def prepare(self, state: Any) -> Callable[[], None]:
        load = super().prepare(state)

        def load_all() -> None:
            load()
            self._behind = 0

        return load_all

    def prepare_merge(self, other: Tracker) -> Callable[[], bool]:
        assert isinstance(other, GradientTracker)
        self.catch_up()
        other.catch_up()
        return super().prepare_merge(other)

    def _window_steps(self) -> int:
        return self._steps._window_steps()

    def advance(self) -> None:
        self.catch_up()
        super().advance()


class Gradients:
    """Norms of the gradients that backward left in `.grad`, and of those that the optimizer finds there. A backward
    pass overwrites what the one before it left: under gradient accumulation the step counts the last, which holds the
    sum.

    Args:
        stages: those of GRADIENTS that are wanted.
        steps: whose steps they are.
        by_name: whether the user has asked for them.
        others: parameters that other ranks watch and this one holds too. Whether a step has gradients is asked of them
            as well: it is to be the same on all ranks, so that a parameter without one counts as 0.
        optimizers: all that make a step together.
    """

    def __init__(
        self,
        watched: list[WatchedParameter],
        ring: int,
        window_blocks: int,
        stages: Iterable[str],
        steps: Tracker,
        *,
        by_name: bool,
        others: Sequence[WatchedParameter] = (),
        optimizers: Sequence[Any] = (),
    ) -> None:
        self._optimizers = list(optimizers)
        self._stepping: list[Optimizer] = []  # those that were about to make this step
        self._watched, wanted = watched, set(stages)
        self._held = [*watched, *others]
        # Of the gradients of DTensors alone a rank may not know its part.
        self._left = [parameter for parameter in others if hasattr(parameter.owner[parameter.key], "placements")]
        self.trackers = {
            stage: GradientTracker(watched, ring, window_blocks, steps) for stage in GRADIENTS if stage in wanted
        }
        self._device = steps.table.rows.device
        self._before: Tensor | None = None  # what the last backward pass left
        self._used: Tensor | None = None  # what the optimizers found
        self._list = _core.GradientList([(parameter.owner, parameter.key, parameter.shadow) for parameter in watched])
        self._indices = DeviceIndices()
        self._buffers = {stage: self._new_sums() for stage in self.trackers}
        self._others: Tensor | None = None  # sums before the step of one of several optimizers
        #: Whether somebody says when backward has ended. By default they come where somebody does; whoever asks for
        #: them by name is told when nobody did.
        self._expected = BEFORE in self.trackers and by_name
        self.missed = 0  #: steps with gradients of which nobody said that backward had ended
        #: Why steps of the open window have no norm of some stage although there were gradients, by stage.
        self.unknown: dict[str, str] = {}
        self._was_told = False  # that backward had ended, in this step

    def observe_before_clipping(self, scale: Tensor | float = 1.0) -> None:
        """Take the gradients after a backward pass; `scale` is what the loss was multiplied by."""
        if BEFORE in self.trackers:
            self._expected = True
            self._was_told = self._any()
            self._before = self._sums(BEFORE, scale, self._buffers[BEFORE]) if self._was_told else None

    def observe_taken(self) -> None:
        """Count the step as one whose gradients are not known as backward left them: optimizers have stepped in it."""
        if BEFORE in self.trackers:
            self._before, self._was_told = None, True
            self.unknown.setdefault(BEFORE, TAKEN + "; stats=[..., 'clipped_grad_norm'] reads each as its step uses it")

    def observe_used(self, optimizer: Optimizer | None = None) -> None:
        """Take the gradients right before the step of this optimizer; without one, before the step of all of them."""
        if USED not in self.trackers:
            return
        if optimizer is not None:
            self._stepping.append(optimizer)
        # A fused optimizer takes the scale out of the gradients itself.
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        if self._used is None or optimizer is None:
            self._used = self._sums(USED, scale, self._buffers[USED])
            return  # others' parameters too, until their own call
        if self._others is None:
            self._others = self._new_sums()
        sums = self._sums(USED, scale, self._others)
        if sums is None:
            self._used = None
            return
        rows = self._rows_of(_ids_of([optimizer]))
        self._used.index_copy_(0, rows, sums.index_select(0, rows))

    def _rows_of(self, own: set[int]) -> Tensor:
        """Return the rows of parameters with these ids."""
        held = [
            (one.owner.get(one.key), one.shadow) for one in self._watched
        ]  # as the optimizers have them, not shards
        return self._indices.on(self._device, [i for i, pair in enumerate(held) if any(id(one) in own for one in pair)])

    def _leave_out_skipped(self, used: Tensor) -> None:
        """Count as 0 the gradients of optimizers that a GradScaler had make no step: what was read before the others'
        steps still has its scale, and nobody got it."""
        if 0 < len({id(optimizer) for optimizer in self._stepping}) < len(self._optimizers):
            used.index_fill_(0, self._rows_of(_ids_of(self._optimizers) - _ids_of(self._stepping)), 0)

    def observe_step(self) -> None:
        """Count a step with the gradients that were taken for it."""
        before, used, self._before, self._used = self._before, self._used, None, None
        if used is not None:
            self._leave_out_skipped(used)
        self._stepping = []
        for stage, tracker in self.trackers.items():
            sums = before if stage == BEFORE else used
            if sums is None:
                tracker.observe_nothing()
            elif tracker.observe(sums):
                tracker.settle()
        if before is None and self._expected and not self._was_told and self._any():
            self.missed += 1
        self._was_told = False

    def _any(self) -> bool:
        return any(_with_gradient(parameter).grad is not None for parameter in self._held)

    def _new_sums(self) -> Tensor:
        return torch.empty(len(self._watched), _core.STEP_COLUMNS, dtype=torch.float64, device=self._device)

    def forget_unknown(self) -> None:
        """Forget why steps have no norms: a window begins."""
        self.unknown.clear()

    def _sums(self, stage: str, scale: Tensor | float, out: Tensor) -> Tensor | None:
        """Write the sums of every parameter's gradient to `out` and return it; None where this rank does not know its
        part of one."""
        if self._left and self._parts(stage, self._left) is None:
            return None
        if not self._list.read(out):
            # The slow way, for those that are sparse, sharded or strided.
            parts = self._parts(stage, self._watched)
            if parts is None:
                return None
            nothing = torch.empty(0, device=self._device)
            _core.square_sums([nothing if part is None else _dense(part) for part in parts], out)
        if isinstance(scale, Tensor) or scale != 1.0:
            square = _square_of(scale, out)
            out[:, 0] /= square
            out[:, 3] /= square
        return out

    def _parts(self, stage: str, parameters: Sequence[WatchedParameter]) -> list[Tensor | None] | None:
        """Return the parts of gradients that belong to what this rank holds, None for one that is not there; for all
        where it does not know one of them."""
        parts: list[Tensor | None] = []
        for parameter in parameters:
            tensor = _with_gradient(parameter)
            gradient = tensor.grad
            part = None if gradient is None else gradient_part(tensor, gradient)
            if part is None and gradient is not None:
                if stage not in self.unknown:
                    self.unknown[stage] = why_not_known(parameter.name, tensor, gradient)
                return None
            parts.append(part)
        return parts

    def describe(self, result: MetricResult, wanted: frozenset[str]) -> None:
        """Add grad_norm and clipped_grad_norm to a result."""
        for stage, tracker in self.trackers.items():
            if stage not in wanted or not tracker.has_steps:
                continue
            rows = tracker.described_rows().of_norms()
            result.leave(functools.partial(rows.add_to, quantity=stage), rows.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the stages that are wanted."""
        return {stage: tracker.state_dict() for stage, tracker in self.trackers.items()}


def _square_of(scale: Tensor | float, like: Tensor) -> Tensor | float:
    """Return the square of a number in float64, one that a device's tensors can be divided by without a copy to it."""
    if not isinstance(scale, Tensor):
        return float(scale) * float(scale)
    # One number of the host is an argument of the kernel.
    scale = scale.detach().reshape(())
    return (scale if scale.is_cpu else scale.to(like.device)).double().square()


def _ids_of(optimizers: Iterable[Any]) -> set[int]:
    groups = (group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ()))
    return {id(tensor) for group in groups for tensor in group["params"]}


def _with_gradient(parameter: WatchedParameter) -> Tensor:
    """Return the tensor that has the gradient: of a master copy, the parameter."""
    tensor = parameter.owner.get(parameter.key) if parameter.shadow is None else parameter.shadow
    return parameter.tensor if tensor is None else tensor


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return (
        gradient.detach() if torch.ops.aten.is_non_overlapping_and_dense(gradient) else gradient.detach().contiguous()
    )
