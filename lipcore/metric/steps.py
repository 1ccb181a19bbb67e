"""What makes a step: the optimizer that the loop calls, and those that work inside it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_DEEPEST = 4  # wrappers around wrappers
_MOST = 64  # entries of a list in which optimizers are looked for
# Trainers, whose wrappers pass step() on, or leave it out.
_PASSING_ON = ("accelerate.", "lightning.", "lightning_fabric.", "pytorch_lightning.")

_SCALED_STEP = torch.amp.GradScaler.step.__code__

Hook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


def checked_optimizers(given: Any) -> list[Any]:
    """Return the optimizers of an argument that is one, several or None.

    Raises:
        TypeError: one of them has no step() and param_groups, or is a learning rate scheduler.
    """
    several = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for one in several:
        if isinstance(one, LRScheduler) or (hasattr(one, "get_last_lr") and not hasattr(one, "param_groups")):
            where = "optimizers" if not hasattr(one, "optimizer") and hasattr(one, "optimizers") else "optimizer"
            raise TypeError(
                f"optimizer: {type(one).__name__} is a learning rate scheduler; pass the optimizer that it drives "
                f"(scheduler.{where})"
            )
        if not _is_optimizer(one):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer (or a sequence of them), got {type(one).__name__}; a "
                "wrapper of your own needs step() and param_groups"
            )
    return several


def _is_optimizer(thing: Any) -> bool:
    """Return whether a loop could call its step(): it need not be a torch.optim.Optimizer."""
    if isinstance(thing, Optimizer):
        return True
    return not isinstance(thing, type) and callable(getattr(thing, "step", None)) and hasattr(thing, "param_groups")


def _has_hooks(optimizer: Any) -> bool:
    """Return whether torch calls hooks around its step: not where Optimizer.__init__ was never called."""
    return isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in vars(optimizer)


def scaler_inside(optimizers: Sequence[Any]) -> Any:
    """Return the GradScaler with which a trainer's wrapper steps (accelerate's, Lightning's), if it has one."""
    for optimizer in optimizers:
        strategy = getattr(optimizer, "_strategy", None)
        for holder in (optimizer, *(getattr(strategy, name, None) for name in ("precision_plugin", "precision"))):
            scaler = getattr(holder, "__dict__", {}).get("scaler")
            if isinstance(scaler, torch.amp.GradScaler):
                return scaler
    return None


def scaler_above() -> bool:
    """Return whether an enabled GradScaler is making the step from which this is called. Nothing else says so: a scaler
    leaves no mark on an optimizer."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _SCALED_STEP:
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back
    return False


def optimizers_inside(wrapper: Any, depth: int = _DEEPEST) -> list[Optimizer]:
    """Return torch's optimizers that a wrapper keeps in its attributes (Lookahead, SAM, accelerate, schedule-free,
    ZeRO), innermost ones where these are wrappers too, each once."""
    found: dict[int, Optimizer] = {}
    if _is_plain(wrapper):
        return []
    for value in _kept(wrapper):
        if value is wrapper or not _is_optimizer(value):
            continue
        deeper = optimizers_inside(value, depth - 1) if depth > 1 else []
        for optimizer in deeper or ([value] if _has_hooks(value) else []):
            found[id(optimizer)] = optimizer
    return list(found.values())


def _kept(wrapper: Any) -> Iterator[Any]:
    for value in list(getattr(wrapper, "__dict__", {}).values()):
        if isinstance(value, (list, tuple)):
            yield from value[:_MOST]
        elif isinstance(value, Mapping) and len(value) <= _MOST:
            yield from value.values()
        else:
            yield value


class WatchedStep:
    """A step() in the place of an object's own (or another method, by `name`), which tells when it begins and ends.

    It stands in the object's attributes, where a scheduler may wrap it in turn, and goes with :meth:`remove`. A copy of
    the object has the object's own step.
    """

    def __init__(
        self,
        owner: Any,
        before: Callable[..., None],
        after: Callable[..., None],
        abandoned: Callable[[], None],
        name: str = "step",
    ) -> None:
        self._owner, self._name = owner, name
        self._own: Any = getattr(owner, "__dict__", {}).get(name)  # None: its class's
        self._step = getattr(owner, name)
        self._before: Callable[..., None] | None = before
        self._after: Callable[..., None] | None = after
        self._abandoned: Callable[[], None] | None = abandoned
        try:
            setattr(owner, name, self)
        except AttributeError as error:
            raise TypeError(
                f"optimizer: {type(owner).__name__} lets nobody set its step (__slots__?), so it cannot be watched; "
                "pass none and call monitor.step() after every step"
            ) from error

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self._before is not None:
            self._before(arguments, keywords)
        try:
            result = self._step(*arguments, **keywords)
        except BaseException:
            if self._abandoned is not None:
                self._abandoned()
            raise
        if self._after is not None:
            self._after(arguments, keywords)
        return result

    # What torch's schedulers ask of a bound method before they wrap it, and its GradScaler before it is called.

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._step)

    @property
    def __func__(self) -> WatchedStep:
        return self

    def __get__(self, owner: Any, kind: type | None = None) -> WatchedStep:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_step" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._step, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._owner, self._name)) if self._own is None else (_itself, (self._own,))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        copied = memo.get(id(self._owner), self._owner)
        return getattr(type(copied), self._name).__get__(copied)

    def remove(self) -> None:
        """Put the object's own step back, or do nothing from now on where somebody has wrapped this one."""
        self._before = self._after = self._abandoned = None
        if vars(self._owner).get(self._name) is not self:
            return
        own = self._own
        while isinstance(own, WatchedStep) and own._after is None:  # another Monitor's, closed before this one
            own = own._own
        if own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, own)


def _itself(step: Any) -> Any:
    return step


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
        self._depth = 0  # of hooks that call one another there
        self._inner: tuple[Any, ...] | None = None  # the last inner step in it
        self._stepped: set[int] = set()  # of several inside, outside the wrapper's step
        self._calls_own = bool(self.inside)  # whether a step() that was put in the place of torch's calls that
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        given = self.given
        if _has_hooks(given) and not self.inside and not _is_replaced(given) and not _may_nest(given):
            self._handles.append(given.register_step_pre_hook(self._before))
            self._handles.append(given.register_step_post_hook(self._after))
            return
        own = [given] if _has_hooks(given) and not _may_nest(given) else []
        for optimizer in self.inside or own:
            if _may_nest(optimizer):
                self._attach_nested(optimizer)
                continue
            self._handles.append(optimizer.register_step_pre_hook(self._before_inner))
            self._handles.append(optimizer.register_step_post_hook(self._after_inner))
        self._handles.append(WatchedStep(given, self._begin, self._end, self._abandon))
        if self.inside and callable(getattr(given, "second_step", None)):
            calls = (self._begin_second, self._end_second, self._abandon_second)
            self._handles.append(WatchedStep(given, *calls, name="second_step"))

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

        self._handles.append(optimizer.register_step_pre_hook(before))
        self._handles.append(optimizer.register_step_post_hook(after))
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

    def _begin_second(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._second = not self._open
        if self._second:
            self._inner = None

    def _end_second(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
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


def _is_replaced(optimizer: Any) -> bool:
    """Return whether something else than its class's step(), or a scheduler's count of that, is called."""
    step = vars(optimizer).get("step")
    return step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step


def _may_nest(optimizer: Any) -> bool:
    """Return whether its step() may call another class's, around which torch calls the same hooks once more. torch's
    own wrapper stands in each class that was made first, around one function (AdamW's is Adam's)."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not Optimizer and "step" in vars(kind)]
    return len({inspect.unwrap(vars(kind)["step"]) for kind in kinds}) > 1


def _is_plain(optimizer: Any) -> bool:
    """Return whether it is one of torch's own optimizers, which keep none inside."""
    return _has_hooks(optimizer) and type(optimizer).__module__.startswith("torch.optim.")


def refuse_strangers(optimizers: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise a ValueError where an optimizer updates nothing of the model: neither its parameters nor float32 copies of
    half-precision ones.

    Args:
        named: the model's parameters by name.
    """
    own = {id(parameter) for parameter in named.values()}
    shapes = {parameter.shape for parameter in named.values() if parameter.dtype.itemsize < 4}
    for optimizer in optimizers:
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if own and updated and not any(id(p) in own or p.shape in shapes for p in updated):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} updates {len(updated)} tensors, none of which is a parameter "
                "of the model; pass the optimizer of this very model, made after its parameters got their final form "
                "(to(), wrappers, sharding)"
            )


def updating(given: Sequence[Any]) -> list[Optimizer]:
    """Return the optimizers whose own state says what a step does: none of a wrapper that changes it."""
    found: list[Optimizer] = []
    for one in given:
        inside = optimizers_inside(one)
        if _has_hooks(one) and not inside:
            found.append(one)
        elif type(one).__module__.startswith(_PASSING_ON):
            found += inside
    return found
