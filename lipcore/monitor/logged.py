"""What a loop logs: the loss, the learning rate, the tokens; read later, so that no device is waited for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore.metric.later import Later
from lipcore.metric.listener import Listener
from lipcore.metric.pace import PROMPT, Pace
from lipcore.metric.results import MetricResult
from lipcore.metric.state import checked_tensor, is_count
from lipcore.metric.values import Value
from lipcore.monitor.logged_part import LoggedPart, note_of, values_of
from lipcore.monitor.logged_queue import Entry, LoggedQueue, OnLogged, read_numbers

_BLOCK = 64  # steps that are handed on together


class Logged:
    """The numbers that a loop logs, by step.

    A call belongs to the step that comes next, or to the last one: as the first call came before the first step, or
    after it. Several calls in one step (micro-batches) are averaged.
    """

    def __init__(self) -> None:
        self._blocks, self._prompt = LoggedQueue(Pace(_BLOCK)), LoggedQueue(Pace(_BLOCK, PROMPT))
        self._before: bool | None = None  # whether calls come before their step
        self._window: list[Entry] = []  # of the open window
        self._part: LoggedPart | None = None  # of the last window that was closed

    @property
    def begun(self) -> bool:
        """True once the loop has logged anything."""
        return self._before is not None

    def listen(self, listener: OnLogged, *, prompt: bool = False) -> None:
        """Call this for the numbers from now on, in blocks; a `prompt` one as soon as it costs little."""
        (self._prompt if prompt else self._blocks).listeners.append(listener)

    def add(self, step: int, steps_here: int, values: Mapping[str, Any]) -> None:
        """Take numbers when so many steps have been made, in this process too."""
        if self._before is None:
            self._before = steps_here == 0
        number = step + 1 if self._before else step
        entries = [(number, name, _kept(value)) for name, value in values.items()]
        self._window += entries
        self._blocks.add(entries)
        self._prompt.add(entries)

    def step(self, number: int) -> None:
        """Hand on to prompt listeners, if it is time, what has come of the steps up to this one, which was made."""
        self._prompt.step(number if self._before else number - 1)

    @property
    def complete(self) -> int:
        """The last step of which prompt listeners have all that was logged of it, and before it."""
        return self._prompt.complete

    def result(self, first: int, last: int) -> MetricResult | None:
        """Return what was logged since the last window closed, and start the next one; None where nothing was. What is
        logged after its step comes too late for a window that this step closes: where the numbers are not those of the
        window's steps, from the first to the last, their notes say of which."""
        taken = [one for one in self._window if one[0] <= last]
        self._window = [one for one in self._window if one[0] > last]  # of a step that is made next, or waits
        self._part = None
        if not taken:
            return None
        steps = sorted({step for step, _, _ in taken})
        late = steps[0] < first or not self._before
        note = note_of(steps[0], steps[-1]) if late else ""
        result = MetricResult("logged", steps=[steps[0], steps[-1]])
        read = Later(lambda: read_numbers(taken), 8 * len(taken))
        self._part = LoggedPart([name for _, name, _ in taken], read, [steps[0], steps[-1]], late)
        for name in dict.fromkeys(name for _, name, _ in taken):
            where = [i for i, (_, other, _) in enumerate(taken) if other == name]
            reducers = read.then(lambda numbers, where=where: _reduced(numbers[where], note))  # type: ignore[misc]
            result.add_later(name, "total", "total", read, reducers)
        return result

    def part(self) -> LoggedPart:
        """Return what the last window that was closed adds to that of all ranks; once."""
        part, self._part = self._part, None
        return part or LoggedPart([], Later(lambda: np.empty(0)), [], False)

    def hurry(self) -> None:
        """Hand what waits to the listeners at the next steps, not only when there is a block."""
        self._blocks.hurry()

    def hand_on(self) -> None:
        """Hand all numbers to the listeners. Waits for a device."""
        self._blocks.hand_on()
        self._prompt.hand_on()

    def state_dict(self) -> dict[str, Any]:
        """Return what was logged in the open window."""
        numbers = torch.from_numpy(read_numbers(self._window))
        steps = [step for step, _, _ in self._window]
        return {"steps": steps, "names": [name for _, name, _ in self._window], "numbers": numbers}

    def load_state_dict(self, state: Any) -> None:
        """Take over such a state; ValueError naming what is wrong where it is none."""
        if not isinstance(state, dict):
            raise ValueError(f"logged: expected a dict, got {type(state).__name__}")
        steps, names = state.get("steps"), state.get("names")
        if not isinstance(steps, list) or not all(map(is_count, steps)):
            raise ValueError("logged.steps: expected a list of counts")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != len(steps):
            raise ValueError("logged.names: expected a list of as many names as steps")
        numbers = checked_tensor("logged.numbers", state.get("numbers"), torch.float64, (None,))
        if len(numbers) != len(steps):
            raise ValueError(f"logged.numbers: expected {len(steps)} of them, got {len(numbers)}")
        self._window = list(zip(steps, names, numbers.tolist(), strict=True))

    def take_over(self, loaded: Logged) -> None:
        """Go on with what a checkpoint had of the open window; what waits here is not of its steps."""
        self._window = loaded._window
        self._blocks.clear()
        self._prompt.clear()


class LoggedListener(Listener):
    """Listener by which what a loop has logged is handed on before a checkpoint is made, and at the end."""

    def __init__(self, logged: Logged) -> None:
        self._logged = logged

    def state_taken(self) -> None:
        self._logged.hand_on()

    def closed(self) -> None:
        self._logged.hand_on()


def _kept(value: Any) -> Any:
    """Return a number as it is now: the loop may go on with its tensor in place."""
    if not isinstance(value, Tensor):
        return float(value)
    if type(value) is Tensor and value.is_cpu:
        return float(value.item())  # which costs less than a copy, and waits for nothing
    return value.detach().reshape(()).clone()


def check_logged(values: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, naming the keyword, for what is no number."""
    for name, value in values.items():
        if not isinstance(value, (Tensor, Real)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a tensor with one number, got {type(value).__name__}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name}: expected a tensor with one number, got one of shape {list(value.shape)}; reduce it"
            )
        if isinstance(value, Tensor) and value.is_complex():
            raise TypeError(f"{name}: expected a tensor with one number, got a complex one; log its abs()")


def _reduced(numbers: NDArray[np.float64], note: str) -> dict[str, Value]:
    finite = numbers[np.isfinite(numbers)]
    mean, low, high = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
    return values_of(mean, low, high, len(finite), len(numbers) - len(finite), (float(numbers[-1]), 1), note, "")
