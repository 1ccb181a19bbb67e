"""The clock of a Monitor: one tick per step of all its optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lipcore.metric.steps import StepCalls, Stepper


@dataclass
class Calls:
    """Functions that a Clock calls; None where nobody wants to know.

    Attributes:
        after: the last optimizer has stepped.
        skipped: the same, but a GradScaler kept all of them (fused ones) from stepping.
        fail: gets what would have been raised in a hook.
        begins: an optimizer, whichever, is about to step.
        before: the first optimizer is about to step.
        uses: this optimizer's gradients are as its step uses them: right before it, or after one with a closure.
        each: this optimizer has stepped.
    """

    after: Callable[[], None]
    skipped: Callable[[], None]
    fail: Callable[[Exception], None]
    begins: Callable[[], None] | None = None
    before: Callable[[], None] | None = None
    uses: Callable[[Optimizer], None] | None = None
    each: Callable[[Optimizer], None] | None = None


class Clock:
    """Clock that ticks when every optimizer has stepped once, as they do that share one backward pass (Muon beside
    AdamW).

    Optimizers that step at rates of their own (the two of a GAN) have no common step: that is an error.
    """

    def __init__(self, optimizers: Sequence[Any], calls: Calls) -> None:
        self._calls = calls
        self._stepped: set[int] = set()
        self._started = self._moved = False
        self.inside = False  #: an optimizer's step has begun and is not over
        uses = None if calls.uses is None else self._on_use
        self._steppers = [
            Stepper(
                given,
                StepCalls(self._on_begin, uses, self._on_each, functools.partial(self._on_after, i), self._on_none),
            )
            for i, given in enumerate(optimizers)
        ]

    @property
    def stepping(self) -> list[Any]:
        """All objects whose step() may be called."""
        return [thing for stepper in self._steppers for thing in (stepper.given, *stepper.inside)]

    @property
    def between_steps(self) -> bool:
        """True while no optimizer has begun a step that it, or the others, have not made."""
        return not (self.inside or self._stepped or any(stepper.away for stepper in self._steppers))

    def __str__(self) -> str:
        names = [f"{type(stepper.given).__name__}.step" for stepper in self._steppers]
        return " and ".join(names) or "monitor.step()"

    def _on_begin(self) -> None:
        if self.inside and not self._stepped:
            self._started = False  # the step before has raised
        if not self.inside and self._calls.begins is not None:
            self._calls.begins()
        self.inside = True
        if not self._started and self._calls.before is not None:
            self._started = True
            self._calls.before()

    def _on_none(self) -> None:
        self.inside = False
        self._started = bool(self._stepped)

    def _on_use(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._calls.uses is not None and not _has_closure(arguments, keywords):
            self._calls.uses(optimizer)

    def _on_each(self, optimizer: Optimizer) -> None:
        if self._calls.each is not None:
            self._calls.each(optimizer)
        found_inf = getattr(optimizer, "found_inf", None)  # there while a GradScaler steps a fused optimizer
        if not (isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(found_inf)):
            self._moved = True

    def _on_after(self, index: int, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.inside = False
        if self._calls.uses is not None and _has_closure(arguments, keywords):
            self._calls.uses(optimizer)
        if len(self._steppers) == 1 or self._all_stepped(index):
            self._tick()

    def _tick(self) -> None:
        moved, self._moved, self._started = self._moved, False, False
        self._stepped.clear()
        self._calls.after() if moved else self._calls.skipped()

    def _all_stepped(self, index: int) -> bool:
        if index in self._stepped:
            others = [stepper.given for i, stepper in enumerate(self._steppers) if i not in self._stepped]
            names = [type(other).__name__ for other in others]
            twice = type(self._steppers[index].given).__name__
            self._stepped.clear()
            self._started = self._moved = False
            self._calls.fail(
                ValueError(
                    f"optimizer: {twice} has stepped twice before {', '.join(names)} stepped once: "
                    "they have no common step; give each its own Monitor, on the part of the model it updates"
                )
            )
            return False
        self._stepped.add(index)
        return len(self._stepped) == len(self._steppers)

    def finish(self) -> bool:
        """Finish the open step, in which the other optimizers will not step any more, and return whether there was
        one."""
        if not self._stepped:
            return False
        self._tick()
        return True

    def close(self) -> None:
        """Remove the hooks."""
        for stepper in self._steppers:
            stepper.remove()


class ScaledSteps:
    """Detector of the steps that a GradScaler skipped without calling the optimizer.

    update() gives the scaler a new record of its optimizers; a record that was closed without a tick is a skipped step.
    Nothing is read from a device.

    Args:
        skipped: called for each of them.
    """

    def __init__(self, scaler: Any, clock: Clock, skipped: Callable[[], None]) -> None:
        self._scaler, self._skipped, self._clock = scaler, skipped, clock
        self._ours = {id(optimizer) for optimizer in clock.stepping}
        self._records = scaler._per_optimizer_states
        self.ticked = False  #: whether the clock has ticked since the last update()

    def look(self) -> None:
        """Look for a skipped step: at the end of every backward pass, and before results are made."""
        records, self._records = self._records, self._scaler._per_optimizer_states
        if records is self._records or self._ours.isdisjoint(records):
            return
        if not self._clock.finish() and not self.ticked:
            self._skipped()
        self.ticked = False


def _has_closure(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Return whether step(closure=None) was given a closure; the first argument is the optimizer."""
    closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
    return closure is not None
