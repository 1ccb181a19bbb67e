"""Forward passes that are lipcore's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lipcore import _core
from lipcore.models.torch_internals import top_saved_tensors_hooks


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Keep forward passes of this thread from being recorded: lipcore's own, which are no part of the training. What
    their graphs keep does not go through the hooks of a checkpoint around the model, which counts it."""
    _core.pause(1)
    try:
        with saved_tensors_hooks(_as_it_is, _as_it_is) if top_saved_tensors_hooks(False) else contextlib.nullcontext():
            yield
    finally:
        _core.pause(-1)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
