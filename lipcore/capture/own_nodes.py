"""How many graph nodes a model's own operations have made, without those that lipcore's hooks add."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lipcore.models.torch_internals import nodes_made

P = ParamSpec("P")
R = TypeVar("R")


class _Own(threading.local):
    made = 0
    others = -1  # made by others, while a hook of lipcore's is running; -1 outside
    begun = 0  # tensors that require gradients by lipcore alone


_own = _Own()


def counted(hook: Callable[P, R]) -> Callable[P, R]:
    """Return a function that does the same, and all of whose nodes are lipcore's. Not for what torch.compile traces."""

    @functools.wraps(hook)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        if _own.others >= 0:  # inside another one
            return hook(*args, **kwargs)
        _own.others = nodes_made() - _own.made
        try:
            return hook(*args, **kwargs)
        finally:
            _own.made, _own.others = nodes_made() - _own.others, -1

    return inner


def note_begun() -> None:
    """Note that a tensor requires gradients from here on which would not: what others make of it adds nodes that they
    would not make without lipcore."""
    _own.begun += 1


def gradients_begun() -> int:
    """Return a number that grows by one with every call of :func:`note_begun` in this thread."""
    return _own.begun


def nodes_of_others() -> int:
    """Return a number that grows by one for every node that this thread makes outside of lipcore's hooks."""
    made: int = nodes_made()
    return made - _own.made if _own.others < 0 else _own.others
