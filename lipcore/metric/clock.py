"""The clock of a Monitor: one tick per step of all its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@dataclass
class Calls:
    """Functions that a Clock calls; None where nobody wants to know.

    Attributes:
        after: the last optimizer has stepped.
        skipped: the same, but a GradScaler kept all of them (fused ones) from stepping.
        fail: gets what would have been raised in a hook.
        before: the first optimizer is about to step.
        uses: this optimizer's gradients are as its step uses them: right before it, or after one with a closure.
        each: this optimizer has stepped.
    """

    after: Callable[[], None]
    skipped: Callable[[], None]
    fail: Callable[[Exception], None]
    before: Callable[[], None] | None = None
    uses: Callable[[Optimizer], None] | None = None
    each: Callable[[Optimizer], None] | None = None


class Clock:
    """Clock that ticks when every optimizer has stepped once, as they do that share one backward pass (Muon beside
    AdamW).

    Optimizers that step at rates of their own (the two of a GAN) have no common step: that is an error.
    """

    def __init__(self, optimizers: Sequence[Optimizer], calls: Calls) -> None:
        self._optimizers = list(optimizers)
        self._calls = calls
        self._stepped: set[int] = set()
        self._started = self._moved = False
        self._handles: list[Any] = []
        for optimizer in self._optimizers:
            if calls.before is not None or calls.uses is not None:
                self._handles.append(optimizer.register_step_pre_hook(self._on_before))
            self._handles.append(optimizer.register_step_post_hook(self._on_after))

    def __str__(self) -> str:
        return " and ".join(f"{type(optimizer).__name__}.step" for optimizer in self._optimizers) or "monitor.step()"

    def _on_before(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not self._started:
            self._started = True
            if self._calls.before is not None:
                self._calls.before()
        if self._calls.uses is not None and not _has_closure(arguments, keywords):
            self._calls.uses(optimizer)

    def _on_after(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._calls.uses is not None and _has_closure(arguments, keywords):
            self._calls.uses(optimizer)
        if self._calls.each is not None:
            self._calls.each(optimizer)
        found_inf = getattr(optimizer, "found_inf", None)  # there while a GradScaler steps a fused optimizer
        if not (isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(found_inf)):
            self._moved = True
        if len(self._optimizers) == 1 or self._all_stepped(optimizer):
            self._tick()

    def _tick(self) -> None:
        moved, self._moved, self._started = self._moved, False, False
        self._stepped.clear()
        self._calls.after() if moved else self._calls.skipped()

    def _all_stepped(self, optimizer: Optimizer) -> bool:
        if id(optimizer) in self._stepped:
            names = [type(other).__name__ for other in self._optimizers if id(other) not in self._stepped]
            self._stepped.clear()
            self._started = self._moved = False
            self._calls.fail(
                ValueError(
                    f"optimizer: {type(optimizer).__name__} has stepped twice before {', '.join(names)} stepped once: "
                    "they have no common step; give each its own Monitor, on the part of the model it updates"
                )
            )
            return False
        self._stepped.add(id(optimizer))
        return len(self._stepped) == len(self._optimizers)

    def finish(self) -> bool:
        """Finish the open step, in which the other optimizers will not step any more, and return whether there was
        one."""
        if not self._stepped:
            return False
        self._tick()
        return True

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class ScaledSteps:
    """Detector of the steps that a GradScaler skipped without calling the optimizer.

    update() gives the scaler a new record of its optimizers; a record that was closed without a tick is a skipped step.
    Nothing is read from a device.

    Args:
        skipped: called for each of them.
    """

    def __init__(self, scaler: Any, optimizers: Sequence[Optimizer], clock: Clock, skipped: Callable[[], None]) -> None:
        self._scaler, self._skipped, self._clock = scaler, skipped, clock
        self._ours = {id(optimizer) for optimizer in optimizers}
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
