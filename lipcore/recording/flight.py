"""The flight recorder: what a record lacks to tell what went wrong in a step: samples, learning rates, generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore.metric.host_copy import HostCopy, as_bits, of_bits
from lipcore.metric.listener import Listener
from lipcore.metric.pace import Pace
from lipcore.per_sample.open_step import MicroBatch
from lipcore.per_sample.step_listener import StepListener
from lipcore.recording.batches import Batch

_BLOCK = 64  # steps that are handed on together
#: A micro-batch: ids, norms, losses.
_Samples = tuple[Tensor | None, Tensor | None, Tensor | None]
#: What the loop says of one: its samples, the state of a generator.
_Given = tuple[_Samples | None, Tensor | None]
OnScales = Callable[[int, NDArray[np.float64]], None]
OnRates = Callable[[int, NDArray[np.float64], Sequence[str]], None]


class Flight(Listener, StepListener):
    """Flight recorder: keeps the samples of steps, with their gradient norms and losses, the learning rate of every
    group of the optimizers, and a GradScaler's scale, and hands them to a record in blocks. No device is waited for,
    until :meth:`hand_on`.

    Args:
        optimizers: whose rates are read.
        parameters: returns the names of the model's, by their id().
        on_batches: takes the samples of some steps.
        on_rates: takes the first step, learning rates [steps, groups] and the groups' names.
        on_taken_back: told behind which step the norms of samples were wrong, and why.
        on_first: called at the first step.
        scaler: a GradScaler, whose scale is read.
        on_scales: takes the first step, and the scale of each step from there on.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        parameters: Callable[[], Mapping[int, str]],
        on_batches: Callable[[Sequence[Batch]], None],
        on_rates: OnRates,
        on_taken_back: Callable[[int, str], None],
        on_first: Callable[[], None] = lambda: None,
        *,
        scaler: Any = None,
        on_scales: OnScales = lambda first, scales: None,
    ) -> None:
        self._scaler, self._on_scales = scaler, on_scales
        self._scale: Tensor | None = None  # with which the step that has begun is made
        self._scales: list[Tensor] = []
        self._copied_scales: tuple[int, HostCopy] | None = None
        self._on_first: Callable[[], None] | None = on_first
        self._optimizers, self._parameters = optimizers, parameters
        self._on_batches, self._on_rates, self._on_taken_back = on_batches, on_rates, on_taken_back
        self._pace = Pace(_BLOCK)
        self._step = 0  # that was made last
        self._proved = 0  # up to where norms are those of single samples
        self._samples: dict[int, list[_Samples]] = {}  # by step
        # Micro-batches of the step to come and states of a generator, as the loop says, and how many had their backward
        # pass.
        self._given: list[_Given] = []
        self._noted: tuple[list[float], list[_Given]] | None = None  # of a step that was made, and is not taken in
        self._passed = 0
        self._generators: dict[int, Tensor] = {}
        self._doubts: dict[int, str] = {}  # about norms, by step
        self._rates: list[list[float]] = []
        self._group_names: list[str] = []
        self._copied: tuple[dict[int, list[_Samples]], HostCopy] | None = None  # of a device's norms and losses

    # ---- what it is told; each returns at once

    def optimizer_begins(self) -> None:
        """Note the scale of the gradients that the optimizer is about to step with; afterwards it may be another."""
        scale = None if self._scaler is None else self._scaler._scale
        self._scale = None if scale is None else scale.detach().clone()

    def begin_step(self, step: int) -> None:
        """Note that a step is made, before its samples come."""
        if self._on_first is not None:
            first, self._on_first = self._on_first, None
            first()
        if self._pace.is_due(len(self._rates)):
            self._pass_on()
        if self._noted is None:
            self.note_step()
        assert self._noted is not None
        (rates, given), self._noted = self._noted, None
        if self._rates and len(rates) != len(self._rates[-1]):
            self._pass_on_rates(step - 1)
        self._step = step
        self._rates.append(rates)
        if self._scaler is not None:
            nothing = torch.full((1,), torch.nan, device="cpu")
            self._scales.append(nothing if self._scale is None else self._scale.reshape(1))
            self._scale = None
        if given:
            self._take_given(step, given)

    def note_step(self) -> None:
        """Note the learning rates and the samples of a step that was made just now: when it is taken in, they may be
        those of the next."""
        rates = [_rate(group) for optimizer in self._optimizers for group in _groups(optimizer)]
        self._noted = rates, self._given
        self._given, self._passed = [], 0

    def _take_given(self, step: int, given: Sequence[_Given]) -> None:
        if samples := [one for one, _ in given if one is not None]:
            self._samples[step] = samples
        # The state before the first micro-batch makes all of them.
        if generators := [generator for _, generator in given if generator is not None]:
            self._generators[step] = generators[0]

    def name_batch(self, ids: Tensor | None, losses: Tensor | None, generator: Tensor | None) -> None:
        """Take what the loop says of the next backward pass: a micro-batch of the step to come."""
        self._given.append((None if ids is None else (ids, None, losses), generator))

    def backward_ends(self) -> None:
        """Note that what the loop has named so far had its backward pass."""
        self._passed = len(self._given)

    def skip_step(self) -> None:
        """Forget what was named of a step that a GradScaler skipped. That may be found out when the next one has begun:
        what had no backward pass yet is of that."""
        del self._given[: self._passed or None]
        self._passed = 0

    def step_samples(self, batches: Sequence[MicroBatch], doubt: str) -> None:
        named = [batch for batch in batches if batch.ids is not None]
        if named:  # in the place of what the loop has said of them
            self._samples[self._step] = [(b.ids, b.norms.per_sample.detach(), b.losses) for b in named]
            if doubt:
                self._doubts[self._step] = doubt

    def samples_proved(self) -> None:
        self._proved = self._step

    def samples_taken_back(self, reason: str) -> None:
        for step, samples in self._samples.items():
            if step > self._proved:
                self._samples[step] = [(ids, None, losses) for ids, _, losses in samples]
        self._take_copied()
        self._on_taken_back(self._proved, reason)

    def hurry(self) -> None:
        """Hand on what waits at the next steps."""
        self._pace.hurry()

    def hand_on(self) -> None:
        """Hand on all that waits. Waits for a device."""
        self._pass_on()
        self._take_copied()

    # ---- of an engine

    def state_taken(self) -> None:
        self.hand_on()

    def state_loaded(self, step: int) -> None:
        self._step = self._proved = step
        self._samples, self._given, self._generators, self._rates, self._doubts = {}, [], {}, [], {}
        self._passed, self._copied, self._noted = 0, None, None
        self._scale, self._scales, self._copied_scales = None, [], None

    def closed(self) -> None:
        self.hand_on()

    # ---- on its way

    def _pass_on(self) -> None:
        self._take_copied()
        self._pass_on_rates(self._step)
        self._pass_on_scales()
        samples, self._samples = self._samples, {}
        for step in self._generators.keys() - samples.keys():
            samples[step] = []
        batches = [batch for step in sorted(samples) for batch in samples[step]]
        on_device = [as_bits(tensor) for batch in batches for tensor in batch if tensor is not None and tensor.is_cuda]
        if len({tensor.device for tensor in on_device}) == 1:
            self._copied = samples, HostCopy(torch.cat(on_device))
        else:
            self._add(samples, None)

    def _pass_on_scales(self) -> None:
        scales, self._scales = self._scales, []
        if not scales:
            return
        first = self._step - len(scales) + 1
        on_device = [scale for scale in scales if scale.is_cuda]
        if on_device:
            together = torch.cat([scale.to(on_device[0].device, torch.float64) for scale in scales])
            self._copied_scales = first, HostCopy(together)
        else:
            self._on_scales(first, torch.cat(scales).double().numpy())

    def _take_copied(self) -> None:
        if self._copied_scales is not None:
            (first, scales), self._copied_scales = self._copied_scales, None
            self._on_scales(first, scales.tensors()[0].numpy())
        if self._copied is not None:
            (samples, copy), self._copied = self._copied, None
            self._add(samples, copy.tensors()[0])

    def _add(self, samples: dict[int, list[_Samples]], copied: Tensor | None) -> None:
        at = 0

        def on_host(tensor: Tensor | None) -> Any:
            nonlocal at
            if tensor is None:
                return None
            if copied is None or not tensor.is_cuda:
                return tensor.cpu().numpy()
            at += len(tensor)
            return of_bits(copied[at - len(tensor) : at], tensor).numpy()

        found = []
        for step in sorted(samples):
            ids, norms, losses = [], [], []
            for own in samples[step]:
                ids.append(on_host(own[0]))
                norms.append(on_host(own[1]))
                losses.append(on_host(own[2]))
            generator = self._generators.pop(step, None)
            state = None if generator is None else generator.cpu().numpy().tobytes()
            doubt, of_all = self._doubts.pop(step, ""), _joined(norms)
            found.append(Batch(step, _joined(ids), of_all, _joined(losses), state, "" if of_all is None else doubt))
        if found:
            self._on_batches(found)

    def _pass_on_rates(self, last: int) -> None:
        rates, self._rates = self._rates, []
        if rates and rates[0]:
            if len(self._group_names) != len(rates[0]):
                self._group_names = self._named_groups(len(rates[0]))
            self._on_rates(last - len(rates) + 1, np.array(rates), self._group_names)

    def _named_groups(self, count: int) -> list[str]:
        names = self._parameters()
        groups = [group for optimizer in self._optimizers for group in _groups(optimizer)]
        found = [f"param_groups[{i}]{_inside(group, names)}" for i, group in enumerate(groups)]
        return (found + [f"param_groups[{i}]" for i in range(len(found), count)])[:count]  # of groups that are gone


def checked_generator(state: Any) -> Tensor | None:
    """Return a copy of a random generator's state.

    Raises:
        TypeError: it is none.
    """
    if state is None:
        return None
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        what = str(state.dtype) if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"rng_state: expected what torch.get_rng_state() returns, a uint8 tensor, got {what}")
    return state.detach().flatten().clone()


def _groups(optimizer: Any) -> Any:
    return getattr(optimizer, "param_groups", ())


def _inside(group: Any, names: Mapping[int, str]) -> str:
    """Return which parameters a group has, in words."""
    found = [names[id(p)] for p in group.get("params", ()) if id(p) in names]
    return "" if not found else f": {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "")


def _rate(group: Any) -> float:
    """Return a group's learning rate; NaN for one that lies on a device, which would have to be waited for."""
    rate = group.get("lr", np.nan)
    return float("nan") if isinstance(rate, Tensor) and not rate.is_cpu else float(rate)


def _joined(parts: Sequence[Any]) -> Any:
    """Return the numbers of all micro-batches; None where one has none."""
    return None if not parts or any(part is None for part in parts) else np.concatenate(parts)
