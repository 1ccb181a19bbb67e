"""What makes a step: the optimizer that the loop calls, and those that work inside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lipcore.metric.optimizers import has_hooks, optimizers_inside
from lipcore.metric.watched_step import WatchedStep

Hook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


@dataclass
class StepCalls:
    """Callbacks of a Stepper.

    Attributes:
        begin: a step begins.
        uses: gets the optimizer whose gradients are as its step uses them, right before that, and the step's arguments;
            None where nobody wants to know.
        each: gets the optimizer that has stepped, while a GradScaler's verdict on that is still there.
        after: the same as uses, when the step is over.
        none: what had begun was no step.
    """

    begin: Callable[[], None]
    uses: Hook | None
    each: Callable[[Optimizer], None]
    after: Hook
    none: Callable[[], None]


class Stepper:
    """One optimizer as it was given, watched.

    Where it is a wrapper, a step begins and ends with the wrapper's own step(): an averaging optimizer moves the
    weights before and after what is inside it steps. A wrapper's call in which nothing inside steps is none (gradient
    accumulation). A step inside that comes by itself is one; SAM's ends with the second_step() that it comes in.
    """

    def __init__(self, given: Any, calls: StepCalls) -> None:
        self.given, self._calls = given, calls
        self.inside = optimizers_inside(given)
        self._open = False  # inside the wrapper's step
        self._second = False  # inside its second_step(), outside its step
        self.away = False  #: the weights are where SAM's first_step() has moved them, until its second one
        self._depth = 0  # of hooks that call one another there
        self._inner: tuple[Any, ...] | None = None  # the last inner step in it
        self._stepped: set[int] = set()  # of several inside, outside the wrapper's step
        self._calls_own = bool(self.inside)  # whether a step() that was put in the place of torch's calls that
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        given = self.given
        if has_hooks(given) and not self.inside and not _is_replaced(given) and not _may_nest(given):
            self._handles.append(given.register_step_pre_hook(_untraced(self._before)))
            self._handles.append(given.register_step_post_hook(_untraced(self._after)))
            return
        own = [given] if has_hooks(given) and not _may_nest(given) else []
        for optimizer in self.inside or own:
            if _may_nest(optimizer):
                self._attach_nested(optimizer)
                continue
            self._handles.append(optimizer.register_step_pre_hook(_untraced(self._before_inner)))
            self._handles.append(optimizer.register_step_post_hook(_untraced(self._after_inner)))
        self._handles.append(WatchedStep(given, self._begin, self._end, self._abandon))
        if self.inside and callable(getattr(given, "second_step", None)):
            calls = (self._begin_second, self._end_second, self._abandon_second)
            self._handles.append(WatchedStep(given, *calls, name="second_step"))
            if callable(getattr(given, "first_step", None)):
                calls = (self._begin_first, lambda *_: None, lambda: None)
                self._handles.append(WatchedStep(given, *calls, name="first_step"))

    def _attach_nested(self, optimizer: Optimizer) -> None:
        """Watch an optimizer inside around which hooks may be called more than once.

        Inside the wrapper's step the outermost of them count: the wrapper may call, and put back, a step that it has
        taken before this one was watched. Outside it is the step itself, since hooks do not tell of one that has
        raised.
        """

        def before(*arguments: Any) -> None:
            if self._open:
                self._depth += 1
                if self._depth == 1:
                    self._before_inner(*arguments)

        def after(*arguments: Any) -> None:
            if self._open:
                self._depth -= 1
                if self._depth == 0:
                    self._after_inner(*arguments)

        def begin(*arguments: Any) -> None:
            if not self._open:
                self._before_inner(optimizer, *arguments)

        def end(*arguments: Any) -> None:
            if not self._open:
                self._after_inner(optimizer, *arguments)

        self._handles.append(optimizer.register_step_pre_hook(_untraced(before)))
        self._handles.append(optimizer.register_step_post_hook(_untraced(after)))
        self._handles.append(WatchedStep(optimizer, begin, end, self._abandon_inner))

    def _after(self, optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._calls.each(optimizer)
        self._calls.after(optimizer, arguments, keywords)

    def _before(self, optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._calls.begin()
        if self._calls.uses is not None:
            self._calls.uses(optimizer, arguments, keywords)

    # ---- the wrapper's own step

    def _begin(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._open, self._inner, self._depth = True, None, 0
        if not self._calls_own:
            self._before(self.given, arguments, keywords)
        else:
            self._calls.begin()

    def _end(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inner, self._inner, self._open = self._inner, None, False
        self.away = False
        self._stepped.clear()
        if inner is not None:
            self._calls.after(*inner)
        elif not self._calls_own:
            self._after(self.given, arguments, keywords)
        else:
            self._calls.none()

    def _abandon(self) -> None:
        """Count nothing: the step has raised."""
        self._open, self._inner = False, None
        self._calls.none()

    # ---- its second_step(), outside its own step: what is inside begins the step, and here it ends

    def _begin_first(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.away = True

    def _begin_second(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._second = not self._open
        if self._second:
            self._inner = None

    def _end_second(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.away = False
        if self._second and self._inner is not None:
            self._calls.after(*self._inner)
        self._second = False

    def _abandon_second(self) -> None:
        if self._second:
            self._second = False
            self._calls.none()

    # ---- steps inside it

    def _abandon_inner(self) -> None:
        if not self._open:
            self._calls.none()

    def _before_inner(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not self._open:
            self._before(optimizer, arguments, keywords)
        elif self._calls_own and self._calls.uses is not None:
            self._calls.uses(optimizer, arguments, keywords)

    def _after_inner(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._calls_own = True
        self._calls.each(optimizer)
        if self._open or self._second:
            self._inner = optimizer, arguments, keywords
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) >= len(self.inside):
            self._stepped.clear()
            self._calls.after(optimizer, arguments, keywords)

    def remove(self) -> None:
        """Remove the hooks, and put the step back."""
        for handle in self._handles:
            handle.remove()


def _untraced(hook: Any) -> Any:
    """Return a hook that torch.compile calls as it is where it compiles a step, for it would trace all of lipcore."""
    return torch.compiler.disable(hook)


def _is_replaced(optimizer: Any) -> bool:
    """Return whether something else than its class's step(), or a scheduler's count of that, is called."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


def _may_nest(optimizer: Any) -> bool:
    """Return whether its step() may call another class's, around which torch calls the same hooks once more. torch's
    own wrapper stands in each class that was made first, around one function (AdamW's is Adam's)."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not Optimizer and "step" in vars(kind)]
    return len({inspect.unwrap(vars(kind)["step"]) for kind in kinds}) > 1
