"""Steps of the optimizer that move the first layer's bias: Corollaries 2 and 3 are about one kind of step only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.models.gathered import part_of

_SETTINGS = ("momentum", "nesterov", "weight_decay")


class _Rates(NamedTuple):
    """Least and largest learning rate of some steps; not finite where none could be read."""

    steps: int
    low: float
    high: float


class BiasSteps:
    """The steps of one bias: its parameter group, with the learning rate read after every step and before a scheduler
    changes it. Those of a virtual bias are by the group of the layer's weight.
    """

    def __init__(self, *, virtual: bool = False) -> None:
        self._virtual = virtual
        self._optimizers: Sequence[Optimizer] = ()
        self._model: nn.Module | None = None
        self._bias: Tensor | None = None
        self._holder: Optimizer | None = None
        self._index = 0
        self._holders = 0
        self._shared = False
        self._closed: deque[_Rates] = deque(maxlen=0)  # blocks of a sliding window
        self._steps = 0
        self._seen: float | None = None  # the very object, which is cheaper to compare than the number
        self._low, self._high = math.inf, -math.inf

    def prepare(self, optimizers: Sequence[Optimizer], window_blocks: int) -> None:
        self._optimizers = optimizers
        self._closed = deque(maxlen=window_blocks - 1)

    def find(self, model: nn.Module | None, layer: nn.Module | None) -> None:
        """Find the layer's bias and its parameter group anew: the bias may have become another object (moved, loaded,
        rebound), or have been given to an optimizer since."""
        bias = layer._parameters.get("bias") if layer is not None else None  # a parametrized one is not computed
        virtual = bias is None and layer is not None and self._virtual
        if virtual and layer is not None:
            bias = layer._parameters.get("weight")
        held = part_of(model, bias)  # which the optimizers have, also within a pass
        places = [
            (optimizer, i)
            for optimizer in self._optimizers
            for i, group in enumerate(optimizer.param_groups)
            if any(parameter is held for parameter in group["params"])
        ]
        self._holders = len(places)
        self._holder, self._index = places[0] if len(places) == 1 else (None, 0)
        if held is not self._bias:
            owners = model.modules() if model is not None else ()
            uses = sum(own is bias for owner in owners for own in owner._parameters.values())
            self._shared = uses > 1 and not virtual
        self._bias = held if isinstance(held, Tensor) else None

    @property
    def known(self) -> bool:
        """True where there are optimizer objects to look at."""
        return bool(self._optimizers)

    @property
    def holder(self) -> Optimizer | None:
        """The one optimizer that steps it."""
        return self._holder

    @property
    def group(self) -> dict[str, Any] | None:
        """The parameter group that it is in."""
        return None if self._holder is None else self._holder.param_groups[self._index]

    def unlike_sgd(self, layer: str) -> str:
        """Say why steps are not lr times a gradient; "" where they are."""
        group = self.group
        if group is None:
            several = "several of the optimizers" if self._holders else "no optimizer"
            return (
                f"{several} would step a bias of '{layer}', which goes with its weight: its path is defined for the "
                "steps of one plain torch.optim.SGD, passed as optimizer=, and not for a wrapper around it"
            )
        kind = type(self._holder)
        if kind is not torch.optim.SGD:
            return f"a bias of '{layer}' would be stepped by {kind.__qualname__}; its path is defined for plain SGD"
        others = [f"{name}={group[name]!r}" for name in _SETTINGS if group.get(name)]
        return f"SGD has {' and '.join(others)}; the path of a virtual bias is defined for plain SGD" if others else ""

    def observe(self) -> None:
        """Count a step that was just made, and read the bias' learning rate."""
        self._steps += 1
        if self._holder is None:
            return
        # Not the group itself: the optimizer's load_state_dict() makes new ones.
        rate = self._holder.param_groups[self._index].get("lr")
        if rate is not self._seen:
            self._observe_rate(rate)

    def _observe_rate(self, rate: Any) -> None:
        """Take in a learning rate that is another object than the last one. A tensor on a device is not read, since
        that would wait for the device; one on the CPU may change in place, so it is read at every step. Some optimizers
        find a rate of their own, and keep none."""
        if isinstance(rate, Tensor):
            if not rate.is_cpu:
                return
            rate = float(rate)
        else:
            self._seen = rate
            if not isinstance(rate, (int, float)):
                return
        self._low, self._high = min(self._low, rate), max(self._high, rate)

    def _start(self) -> None:
        self._steps, self._seen = 0, None
        self._low, self._high = math.inf, -math.inf

    def reset(self) -> None:
        """Start a new window."""
        self._closed.clear()
        self._start()

    def advance(self) -> None:
        """Slide the window by a block."""
        self._closed.append(_Rates(self._steps, self._low, self._high))
        self._start()

    def state(self) -> list[list[float]]:
        """Return the steps and rates of the window's blocks, the open block last."""
        return [list(block) for block in self._blocks()]

    def load(self, state: list[list[float]]) -> None:
        """Continue from a state; one without blocks (of an earlier lipcore) leaves these steps unrecorded."""
        self.reset()
        blocks = [_Rates(int(steps), low, high) for steps, low, high in state]
        *closed, (steps, self._low, self._high) = blocks or [_Rates(0, math.inf, -math.inf)]
        self._steps = steps
        self._closed.extend(closed)

    def _blocks(self) -> list[_Rates]:
        return [*self._closed, _Rates(self._steps, self._low, self._high)]

    def details(self) -> dict[str, Any]:
        """Return plain values for the window's details; `optimizer` is None where there was no optimizer object to look
        at."""
        blocks = self._blocks()
        low, high = min(block.low for block in blocks), max(block.high for block in blocks)
        known = math.isfinite(low) and math.isfinite(high)
        found: dict[str, Any] = {
            "shared": self._shared,
            "optimizer": None,
            "steps": sum(block.steps for block in blocks),
            "learning_rate": [low, high] if known else None,
        }
        if self._optimizers and self._holder is None:
            found["optimizer"] = "several of them" if self._holders else "none of them"
        elif self._holder is not None:
            kind, group = type(self._holder), self._holder.param_groups[self._index]
            found["optimizer"] = f"{kind.__module__}.{kind.__qualname__}"
            found |= {name: group[name] for name in _SETTINGS if isinstance(group.get(name), (bool, int, float))}
        return found
