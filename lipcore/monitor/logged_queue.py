"""Logged numbers on their way to listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore.metric.host_copy import HostCopy
from lipcore.metric.pace import Pace

OnLogged = Callable[[int, Mapping[str, NDArray[np.float64]]], None]
#: Step, name, and a number or a tensor with one.
Entry = tuple[int, str, Any]


class LoggedQueue:
    """Queue of logged numbers, which are handed to listeners by step, each once and in order, at some pace."""

    def __init__(self, pace: Pace) -> None:
        self.listeners: list[OnLogged] = []
        self._pace = pace
        self._waiting: list[Entry] = []
        self._copied: tuple[list[Entry], HostCopy] | None = None  # of numbers on a device
        self.complete = 0  #: the last step of which, and of all before, everything was handed on

    def add(self, entries: Sequence[Entry]) -> None:
        """Take in numbers of one step; hand on what is complete, if it is time. No device is waited for."""
        if not self.listeners or not entries:
            return
        self._waiting += entries
        self._look(entries[-1][0] - 1)

    def step(self, last: int) -> None:
        """Hand on the numbers of the steps up to this one, to which no more come, if it is time: a loop that
        seldom logs adds nothing for long. No device is waited for."""
        if not self.listeners:
            return
        if self._waiting or self._copied is not None:
            self._look(last)
        left = [*(self._copied[0] if self._copied is not None else ()), *self._waiting]
        self.complete = min([last, *(step - 1 for step, _, _ in left)])

    def _look(self, last: int) -> None:
        """Hand on what is of the steps up to this one, if it is there and time."""
        if self._copied is not None:
            if not self._copied[1].is_there:
                return
            self._take_copied()
        if not self._waiting or not self._pace.is_due(last + 1 - self._waiting[0][0]):
            return
        ready, self._waiting = self._split(last)
        devices = {value.device for _, _, value in ready if isinstance(value, Tensor) and value.is_cuda}
        if len(devices) != 1:
            self._hand_on(ready, read_numbers(ready))
            return
        on_device = [value.double() for _, _, value in ready if isinstance(value, Tensor) and value.is_cuda]
        self._copied = ready, HostCopy(torch.stack(on_device))

    def hurry(self) -> None:
        """Hand on what waits at the next steps, however little it is."""
        self._pace.hurry()

    def hand_on(self) -> None:
        """Hand on all that waits. Waits for a device."""
        self._take_copied()
        ready, self._waiting = self._waiting, []
        if self.listeners and ready:
            self._hand_on(ready, read_numbers(ready))

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting, self._copied, self.complete = [], None, 0

    def _split(self, last: int) -> tuple[list[Entry], list[Entry]]:
        return [one for one in self._waiting if one[0] <= last], [one for one in self._waiting if one[0] > last]

    def _take_copied(self) -> None:
        if self._copied is None:
            return
        (entries, copy), self._copied = self._copied, None
        numbers = iter(copy.tensors()[0].tolist())
        here = [next(numbers) if isinstance(v, Tensor) and v.is_cuda else float(v) for _, _, v in entries]
        self._hand_on(entries, np.array(here))

    def _hand_on(self, entries: Sequence[Entry], numbers: NDArray[np.float64]) -> None:
        for name in dict.fromkeys(name for _, name, _ in entries):
            of_name: dict[int, list[float]] = {}
            for (step, other, _), number in zip(entries, numbers, strict=True):
                if other == name:
                    of_name.setdefault(step, []).append(number)
            steps = sorted(of_name)
            found = (of_name[step] for step in steps)
            means = np.array([each[0] if len(each) == 1 else np.mean(each) for each in found])
            # A name that is not logged at every step comes in pieces.
            begins = [i for i, step in enumerate(steps) if i == 0 or step != steps[i - 1] + 1]
            for begin, end in zip(begins, [*begins[1:], len(steps)], strict=True):
                for listener in self.listeners:
                    listener(steps[begin], {name: means[begin:end]})


def read_numbers(entries: Sequence[Entry]) -> NDArray[np.float64]:
    """Return numbers, of which some may lie on a device: one copy for all of those."""
    values = [value for _, _, value in entries]
    found = np.empty(len(values))
    tensors = [(i, value) for i, value in enumerate(values) if isinstance(value, Tensor) and not value.is_cpu]
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            found[i] = value
        elif value.is_cpu:
            found[i] = value.item()
    for device in {tensor.device for _, tensor in tensors}:
        where = [i for i, tensor in tensors if tensor.device == device]
        found[where] = torch.stack([values[i].double() for i in where]).cpu().numpy()
    return found
