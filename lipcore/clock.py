"""The clock of a Monitor: one tick per step of all its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Clock:
    """Ticks when every optimizer has stepped once, as they do that share one backward pass (Muon beside AdamW).

    Optimizers that step at rates of their own (the two of a GAN) have no common step: that is an error.

    Args:
        before: called before the first of them steps.
        each: where there are several, called after every one's step, while its gradients are still there.
        after: called when the last one has.
        skipped: called instead when a GradScaler kept a fused optimizer from stepping.
        fail: gets what would have been raised in a hook.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        before: Callable[[], None] | None,
        each: Callable[[Optimizer], None],
        after: Callable[[], None],
        skipped: Callable[[], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._optimizers = list(optimizers)
        self._before, self._each, self._after = before, each, after
        self._skipped, self._fail = skipped, fail
        self._stepped: set[int] = set()
        self._started = False
        self._handles: list[Any] = []
        for optimizer in self._optimizers:
            if before is not None:
                self._handles.append(optimizer.register_step_pre_hook(self._on_before))
            self._handles.append(optimizer.register_step_post_hook(self._on_after))

    def __str__(self) -> str:
        return " and ".join(f"{type(optimizer).__name__}.step" for optimizer in self._optimizers) or "monitor.step()"

    def _on_before(self, *_: Any) -> None:
        if not self._started:
            self._started = True
            assert self._before is not None
            self._before()

    def _on_after(self, optimizer: Optimizer, *_: Any) -> None:
        if len(self._optimizers) > 1:
            self._each(optimizer)
            if not self._all_stepped(optimizer):
                return
        self._started = False
        found_inf = getattr(optimizer, "found_inf", None)  # there while a GradScaler steps a fused optimizer
        if isinstance(found_inf, Tensor) and found_inf.is_cpu and bool(found_inf):
            self._skipped()
        else:
            self._after()

    def _all_stepped(self, optimizer: Optimizer) -> bool:
        if id(optimizer) in self._stepped:
            names = [type(other).__name__ for other in self._optimizers if id(other) not in self._stepped]
            self._stepped.clear()
            self._fail(
                ValueError(
                    f"optimizer: {type(optimizer).__name__} has stepped twice before {', '.join(names)} stepped once: "
                    "they have no common step; give each its own Monitor, on the part of the model it updates"
                )
            )
            return False
        self._stepped.add(id(optimizer))
        if len(self._stepped) < len(self._optimizers):
            return False
        self._stepped.clear()
        return True

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
