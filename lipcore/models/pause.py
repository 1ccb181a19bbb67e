"""Forward passes that are lipcore's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lipcore import _core


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Keep forward passes of this thread from being recorded: lipcore's own, which are no part of the training."""
    _core.pause(1)
    try:
        yield
    finally:
        _core.pause(-1)
