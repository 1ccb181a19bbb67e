"""What a TensorStats looks at in sampled steps, and the block of numbers that it goes to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.distributed.gradient_parts import gradient_part, why_not_known
from lipcore.metric.protocol import TAKEN, Needs
from lipcore.metric.rank_part import FSDP1_PIECES, Holding
from lipcore.metric.results import MetricResult
from lipcore.metric.standalone import StandaloneMetric
from lipcore.models.capturing import is_capturing
from lipcore.models.ranks import is_fsdp1
from lipcore.tensor_stats.block import Block
from lipcore.tensor_stats.cut_outputs import CutOutputs
from lipcore.tensor_stats.extra import UNREADABLE, Extra, main_tensor, readable
from lipcore.tensor_stats.watched import Watched, Wishes
from lipcore.trajectory.parameters import WatchedParameter

ONLY_NUMBERS = (
    "this TensorStats is a copy, which holds the numbers of compute() and no model; to go on, make a new one and "
    "load_state_dict() of the original"
)
_CAPTURED = "tensors inside a CUDA graph that is captured are left out: its replays tell the host nothing"


def holds(held: Mapping[tuple[str, str], WatchedParameter]) -> list[tuple[str, str, Tensor]]:
    """Return name, group and tensor of each. A window that waits has those of its time, whatever is watched by now."""
    return [(name, group, one.owner[one.key]) for (name, group), one in held.items()]


class SampledSteps(StandaloneMetric):
    """Base of :class:`lipcore.TensorStats`: binds it to a model and takes what comes in its sampled steps."""

    def __init__(self, wishes: Wishes, every_steps: int) -> None:
        self._wishes = wishes
        self.every_steps, self._window_blocks = every_steps, 1
        self._model: nn.Module | None = None
        self._watched: Watched | None = None
        self._numbers: MetricResult | None = None  # of a copy, which has nothing else
        self._scaler: Any = None
        self._steps_seen = 0
        self._forget_step()
        self._skipped: deque[int] = deque([0], maxlen=1)  # steps that a GradScaler skipped, by block
        self._notes: dict[str, Any] = {}
        self._untrue = ""  # why gradients are not what they are called

    # ---- binding

    def prepare(self, optimizers: Sequence[Any], scaler: Any, window_blocks: int) -> None:
        """Take the GradScaler and the blocks per window of the Monitor."""
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._window_blocks = window_blocks
        self._skipped = deque([0], maxlen=window_blocks)

    def bind(self, model: nn.Module) -> None:
        """Find what is to be measured."""
        if self._numbers is not None:
            raise RuntimeError(ONLY_NUMBERS)
        if self._watched is not None:
            raise RuntimeError("this TensorStats is bound to a model already; make one per model")
        self._model = model
        self._look()

    def _look(self) -> None:
        assert self._model is not None
        self._watched = Watched(self._model, self._wishes, self.prefix)
        self._step, self._open = Block(self._watched.size), Block(self._watched.size)
        self._closed: deque[Block] = deque(maxlen=self._window_blocks - 1)
        self._held = {(p.name, p.group): p for p in (*self._watched.parameters, *self._watched.gradients)}
        fsdp1 = is_fsdp1(self._model)
        self._holding = Holding(partial(holds, self._held), FSDP1_PIECES if fsdp1 else "", model=self._model)
        self._cut = CutOutputs(self._model)
        self._forget_step()
        self._notes = {}

    @property
    def _found(self) -> Watched:
        if self._numbers is not None:
            raise RuntimeError(ONLY_NUMBERS)
        if self._watched is None:
            raise RuntimeError(
                "this TensorStats has no model; pass one to TensorStats(model) or to Monitor(model, metrics=[...])"
            )
        return self._watched

    def rebind(self) -> None:
        """Look at the model anew; a new window starts."""
        assert self._found is not None
        self._look()

    def needs(self) -> Needs:
        found = self._found
        return Needs(gradients=bool(found.gradients), outputs=found.hooked or None)

    # ---- what it observes

    @property
    def _due(self) -> bool:
        return (self._steps_seen + 1) % self.every_steps == 0

    def _forget_step(self) -> None:
        """Forget what has come of the step under way."""
        self._has_gradients = self._has_outputs = False

    def wants_outputs(self) -> bool:
        if not self._due:
            return False
        for extra in self._found.extras:
            extra.begin()
        self._step.passes += 1
        self._has_outputs = True
        return True

    def observe_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Take what a module has returned."""
        found, tensor = self._found, main_tensor(output)
        if not self._has_outputs:
            return  # the pass began before the step under way
        if tensor is None and name in found.row_of_output:
            self._note(found.row_of_output[name], UNREADABLE)
        if tensor is None or self._is_captured(tensor):
            return
        if name in found.row_of_output:
            self._add([tensor], [found.row_of_output[name]])
        if readers := found.readers.get(name, ()):
            cut = self._cut.why_not(module, tensor, whole_model=not name)
            for extra, sums, most in readers:
                extra.problem = extra.problem or (f"{name or 'the model'}: {cut}" if cut else "")
                self._read(extra, sums, most, name, tensor)

    def _read(self, extra: Extra, sums: slice, most: slice, name: str, output: Tensor) -> None:
        if extra.problem:
            return
        try:
            with torch.no_grad():
                numbers = extra.read(name, output)
        except ValueError as error:
            extra.problem = str(error)
            return
        if numbers is None:
            return
        into = self._step.on(output.device)
        into.sums[sums] += numbers[0].to(into.device)
        if extra.most:
            into.most[most] = torch.maximum(into.most[most], numbers[1].to(into.device))

    def observe_gradients(self) -> None:
        """Take the gradients as a backward pass has left them; of several in one step the last one's, which holds the
        sum."""
        found = self._found
        if not self._due:
            return
        begin = len(found.parameters)
        if self._has_gradients:
            for numbers in self._step.parts:
                numbers.forget(begin, begin + len(found.gradients))
        tensors = self._tensors(found.gradients, begin, of_gradients=True)
        if self._scaler is None:
            self._add(*tensors)
        else:
            scale = self._scaler._scale
            for tensor, place in zip(*tensors, strict=True):  # one at a time: each is a copy
                self._add([_without_scale(tensor, scale)], [place])
        self._has_gradients = True

    def observe_taken_gradients(self) -> None:
        """Leave out the gradients of this step: optimizers have stepped in the backward pass."""
        begin = len(self._found.parameters)
        for numbers in self._step.parts if self._due else ():
            numbers.forget(begin, begin + len(self._found.gradients))
        for place in range(begin, begin + len(self._found.gradients)) if self._due else ():
            self._note(place, TAKEN)

    def _add(self, tensors: Sequence[Tensor], places: Sequence[int]) -> None:
        for place, why in self._step.observe(tensors, places).items():
            self._note(place, why)

    def _note(self, place: int, why: str) -> None:
        """Note why a tensor has no numbers."""
        quantity, name, _, _ = self._found.rows[place]
        self._notes.setdefault("not_read", {})[f"{quantity} {name}"] = why

    def _tensors(
        self, parameters: Sequence[WatchedParameter], begin: int, *, of_gradients: bool = False
    ) -> tuple[list[Tensor], list[int]]:
        """Return the tensors that are there, and their places."""
        tensors, places = [], []
        for place, parameter in enumerate(parameters, begin):
            tensor: Tensor | None = parameter.owner.get(parameter.key)
            if tensor is not None and of_gradients:
                tensor = self._part(place, parameter.name, tensor)
            if tensor is None:
                continue
            values = readable(tensor)
            if values is None:
                self._note(place, UNREADABLE)
            elif not self._is_captured(values):
                tensors.append(values)
                places.append(place)
        return tensors, places

    def _part(self, place: int, name: str, parameter: Tensor) -> Tensor | None:
        """Return what the gradient of a parameter has of the elements that this rank holds; None for nothing."""
        gradient = parameter.grad
        part = None if gradient is None else gradient_part(parameter, gradient)
        if part is None and gradient is not None:
            self._note(place, why_not_known(name, parameter, gradient))
        return part

    def _is_captured(self, tensor: Tensor) -> bool:
        captured = is_capturing(tensor)
        if captured:
            self._notes["captured"] = _CAPTURED
        return captured

    def observe_step(self) -> None:
        """Take the parameters, and count the step with what came before it."""
        if self._due:
            self._add(*self._tensors(self._found.parameters, 0))
            self._step.steps = 1
            self._open.take(self._step)
        elif self._has_gradients or self._has_outputs:
            self._step.clear()
        self._forget_step()
        self._steps_seen += 1

    def observe_skipped_step(self) -> None:
        """Forget what came since the last step."""
        self._skipped[-1] += 1
        self._step.clear()
        self._forget_step()

    def observe_unknown_scale(self, reason: str) -> None:
        self._untrue = reason


def _without_scale(gradient: Tensor, scale: Tensor | float | None) -> Tensor:
    """Return a gradient without the factor that a GradScaler has put before the loss; in float32 where it has less,
    which holds what float16 would round to 0."""
    if scale is None:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide / (scale.to(wide.device) if isinstance(scale, Tensor) else scale)
