"""Which of lipcore's own captures have hooks on a model now: each adds nodes to the graphs that the others see."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

_HOOKED: WeakSet[Any] = WeakSet()


def hooked(capture: Any) -> None:
    """Note that a capture has hooks on its `model`."""
    _HOOKED.add(capture)


def unhooked(capture: Any) -> None:
    """Note that it has none any more."""
    _HOOKED.discard(capture)


def is_alone(capture: Any) -> bool:
    """Return whether no other capture has hooks on the same model."""
    return all(other is capture or other.model is not capture.model for other in list(_HOOKED))
