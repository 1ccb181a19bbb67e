"""A step() that tells when it begins and ends."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any


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
