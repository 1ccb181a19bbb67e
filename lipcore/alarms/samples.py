"""The samples with the largest gradient norms in the steps after an alarm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore.alarms.event import AlarmEvent
from lipcore.capture.training_pass import NOT_ACCUMULATED
from lipcore.metric.host_copy import HostCopy, as_bits, of_bits
from lipcore.models.ranks import rank, world_size
from lipcore.per_sample.metric import PerSampleMetric
from lipcore.per_sample.open_step import MicroBatch
from lipcore.per_sample.step_listener import StepListener

_SHOWN = 5
_BEYOND = 2.0  # times the median: a norm stands out
_TOO_MANY = "of a step with 256 micro-batches or more they are summed up at once"


@dataclass(frozen=True)
class SampleNorm:
    """Gradient norm of one sample in one step."""

    step: int
    row: int  #: in the step, over all its micro-batches, from 0
    id: int | None  #: as monitor.log_batch() was told; None where it was not
    norm: float

    def __str__(self) -> str:
        return f"row {self.row}" if self.id is None else f"sample {self.id}"


@dataclass(frozen=True)
class SamplesAfterAlarm:
    """Samples with the largest gradient norms in the steps after an alarm."""

    alarm: int  #: its step
    first: int  #: of the steps that were measured
    last: int
    count: int  #: of samples that were measured
    median: float  #: of those that are finite; NaN where there are none
    largest: tuple[SampleNorm, ...]  #: those that are not finite first; none where all are
    message: str  #: a sentence for people
    told_by: int | None = None  #: rank whose alarm it was, where this one heard of it as windows were merged
    rank: int | None = None  #: whose samples were measured; None where there is one process
    doubt: str = ""  #: why the norms are not proved to be single samples', not of all parameters, or NaN; "" if exact

    @property
    def behind(self) -> int:
        """Steps from that of the alarm to the first that was measured: 1 where it was the next one."""
        return self.first - self.alarm

    @property
    def stands_out(self) -> bool:
        """True where a norm is not finite or beyond twice the median."""
        return bool(self.count) and not (self.largest and self.largest[0].norm <= _BEYOND * self.median)


@dataclass
class _Step:
    """Norms of a step that were measured: on the host, or on their way."""

    step: int
    ids: list[Tensor | None]
    norms: list[Tensor]
    doubt: str
    taken_back: str = ""  # why


@dataclass(frozen=True)
class _Facts:
    """Facts about the measured steps besides their norms."""

    alarm: AlarmEvent
    first: int
    last: int
    rank: int | None  # this one; None: there are no others
    taken_back: str  # why norms of the open step were, or ""
    unrecorded: str  # why passes were, or ""

    @property
    def begin(self) -> str:
        """The alarm, and by whom this rank was told of it."""
        words, by = f"after the alarm in step {self.alarm.step}", self.alarm.rank
        heard = "this rank" if self.rank is None else f"rank {self.rank}"
        return words if by is None else f"{words} on rank {by}, of which {heard} heard as windows were merged"

    @property
    def samples(self) -> str:
        """The samples that were measured."""
        of = "" if self.rank is None else f" of rank {self.rank}"
        return f"samples{of} in " + (
            f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        )

    def aside(self, *said: str) -> str:
        """Return what is said in brackets: how far behind the alarm the steps lie, where they are not the next ones,
        and more; "" where there is nothing to say."""
        first, last = self.first - self.alarm.step, self.last - self.alarm.step
        lag = f"{first} to {last} steps behind it" if first < last else f"{first} steps behind it"
        words = "; ".join(one for one in (lag if first > 1 else "", *said) if one)
        return f" ({words})" if words else ""

    def told(
        self, count: int, median: float, largest: tuple[SampleNorm, ...], what: str, doubt: str
    ) -> SamplesAfterAlarm:
        """Return what was found, and `what` is said of it."""
        alarm, words = self.alarm, f"{self.begin}: {what}"
        return SamplesAfterAlarm(
            alarm.step, self.first, self.last, count, median, largest, words, alarm.rank, self.rank, doubt
        )


class SamplesAfter(StepListener):
    """Switch of a metric of single samples' gradient norms, which is on for some steps after an alarm, and reader of
    what it measures then. Nothing waits for a device, until :meth:`end`.

    Args:
        steps: in which it is on.
        metric: at rest.
        tell: takes what was found.
        failed: takes what the metric raises when it is switched on.
    """

    def __init__(
        self,
        steps: int,
        metric: PerSampleMetric,
        tell: Callable[[SamplesAfterAlarm], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._steps, self._metric, self._tell, self._failed = steps, metric, tell, failed
        self._wanted: AlarmEvent | None = None  # the alarm for which it is, or is to be, on
        self._first: int | None = None  # step in which it is on
        self._step, self._taken_back = 0, ""
        self._summed_up = False  # a step had too many micro-batches
        self._found: list[_Step] = []
        self._unproved: list[_Step] = []  # those since the last good proof
        self._unrecorded: dict[str, int] = {}  # before it was switched on: passes by reason
        self._copied: deque[tuple[_Facts, list[_Step], HostCopy]] = deque()

    def hear(self, event: AlarmEvent) -> None:
        """Have it switched on, where it is not on for an alarm before."""
        if self._wanted is None and not self._metric.off:
            self._wanted = event

    def begin_step(self, step: int) -> None:
        """Note that a step is made, before its samples come."""
        self._step = step

    def between(self, made: int, begun: int) -> None:
        """Switch it on or off, outside of the forward and backward passes; tell of what has come to the host.

        Args:
            made: number of steps that were made.
            begun: of steps whose backward passes have come; one more where the optimizer is about to step.
        """
        try:
            self._switch(made, begun)
        except Exception as error:  # of a model that has changed, of a device: an alarm ends no training
            self.forget()
            self._failed(error)

    def _switch(self, made: int, begun: int) -> None:
        if self._wanted is not None and self._first is None:
            self._first, self._taken_back, self._summed_up = begun + 1, "", False
            self._unrecorded = self._metric.unrecorded
            self._metric.wake()
        elif self._first is not None and made >= self._first + self._steps - 1:
            self._metric.rest()
            self._close(made)
        while self._copied and self._copied[0][-1].is_there:
            self._tell_of_copied()

    def forget(self) -> None:
        """Begin anew, at rest: a checkpoint was loaded."""
        self._copied.clear()
        self._found, self._unproved = [], []
        if self._first is not None:
            self._metric.rest()
        self._wanted = self._first = None

    def end(self) -> None:
        """Tell of what there is, and look for nothing more. Waits for a device."""
        if self._first is not None and self._found:
            self._close(self._step)
        self._wanted = self._first = None
        while self._copied:
            self._tell_of_copied()

    # ---- of the metric

    def step_samples(self, batches: Sequence[MicroBatch], doubt: str) -> None:
        if self._first is not None and not batches:
            self._summed_up = True
        elif self._first is not None:
            norms = [batch.norms.per_sample.detach() for batch in batches]
            one = _Step(self._step, [batch.ids for batch in batches], norms, doubt)
            self._found.append(one)
            self._unproved.append(one)

    def samples_proved(self) -> None:
        self._unproved = []

    def samples_taken_back(self, reason: str) -> None:
        for one in self._unproved:
            one.taken_back = reason
        self._unproved, self._taken_back = [], reason  # of the open step too

    # ---- on its way

    def _close(self, last: int) -> None:
        """Read what the steps up to this one have brought."""
        assert self._wanted is not None
        assert self._first is not None
        number = rank() if world_size() > 1 else None
        facts = _Facts(self._wanted, self._first, last, number, self._taken_back, self._reasons())
        found, self._found = self._found, []
        self._wanted = self._first = None
        tensors = [tensor for one in found for tensor in (*one.norms, *one.ids) if tensor is not None]
        if any(tensor.is_cuda for tensor in tensors):
            # Of numbers that are copied together; what is on the host already is copied from there.
            device = next(tensor.device for tensor in tensors if tensor.is_cuda)
            bits = torch.cat([as_bits(tensor).to(device, non_blocking=True) for tensor in tensors])
            self._copied.append((facts, found, HostCopy(bits)))
        else:
            self._tell(_largest(facts, found))

    def _tell_of_copied(self) -> None:
        facts, found, copy = self._copied.popleft()
        (bits,), at = copy.tensors(), 0
        for one in found:
            own: list[Any]
            for own in (one.norms, one.ids):
                for i, tensor in enumerate(own):
                    if tensor is not None:
                        own[i] = of_bits(bits[at : at + len(tensor)], tensor)
                        at += len(tensor)
        self._tell(_largest(facts, found))

    def _reasons(self) -> str:
        """Return why passes since it was switched on were not recorded."""
        counts = self._metric.unrecorded.items()
        found = [why for why, count in counts if count > self._unrecorded.get(why, 0)] + [_TOO_MANY] * self._summed_up
        if self._found:  # a pass that asks for some gradients is none of the training's
            found = [why for why in found if why != NOT_ACCUMULATED]
        return self._metric.off or "; ".join(found)


def _largest(facts: _Facts, found: Sequence[_Step]) -> SamplesAfterAlarm:
    """Return the samples with the largest norms of all steps."""
    reasons = facts.unrecorded
    taken_back = next((one.taken_back for one in found if one.taken_back), facts.taken_back)
    found = [one for one in found if not one.taken_back]
    steps, rows, norms = [], [], []
    ids: list[int | None] = []
    for one in found:
        count = sum(len(part) for part in one.norms)
        named = all(own is not None for own in one.ids)
        steps.append(np.full(count, one.step))
        rows.append(np.arange(count))
        ids += (
            [int(number) for own in one.ids if own is not None for number in own.tolist()] if named else [None] * count
        )
        norms += [part.double().cpu().numpy() for part in one.norms]
    nothing = np.zeros(0)
    values = np.concatenate([nothing, *norms])
    if not len(values):
        why = taken_back and f"they were taken back: {taken_back}"
        why = why or reasons or "no step has had a recorded backward pass"
        return facts.told(0, float("nan"), (), f"no gradient norms of {facts.samples}{facts.aside(why)}", "")
    doubts = [one.doubt for one in found if one.doubt][:1]
    doubts += [f"others were taken back: {taken_back}"] * bool(taken_back)
    doubt = "; ".join(doubts + [f"others were not recorded: {reasons}"] * bool(reasons))
    samples, aside = f"{len(values)} {facts.samples}", facts.aside(doubt)
    finite = np.isfinite(values)
    at_step, at_row = np.concatenate(steps), np.concatenate(rows)
    median = float(np.median(values[finite])) if finite.any() else float("nan")
    order: NDArray[np.intp] = np.argsort(np.where(finite, -values, -np.inf), kind="stable")
    chosen: dict[tuple[int, int | None, int], int] = {}  # each sample of a step once: a closure's passes have it again
    for i in order.tolist() if finite.any() else []:
        chosen.setdefault((int(at_step[i]), ids[i], int(at_row[i]) if ids[i] is None else 0), i)
        if len(chosen) == _SHOWN:
            break
    rows_of = chosen.values()
    largest = tuple(SampleNorm(int(at_step[i]), int(at_row[i]), ids[i], float(values[i])) for i in rows_of)
    said: Any = [f"{one} in step {one.step} ({_size(one.norm, median)})" for one in largest]
    what = f"the largest gradient norms of {samples}{aside}: {', '.join(said)}"
    if not largest:
        what = f"the gradient norms of all {samples}{aside} are not finite"
    told = facts.told(len(values), median, largest, what, doubt)
    if told.stands_out:
        return told
    beyond = f"no gradient norm of {samples}{aside} is beyond twice the median"
    return replace(told, message=f"{facts.begin}: {beyond}; the largest: {said[0]}")


def _size(norm: float, median: float) -> str:
    if not np.isfinite(norm):
        return "not finite"
    return f"{norm:.3g}" + (f", {norm / median:.3g} times the median" if median > 0 else "")
