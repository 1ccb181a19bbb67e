"""Which passes are the training's: what both engines of this package, and the compiled hooks of batches of one, ask.

A forward pass is the training's when it runs in grad mode as it is written. Others leave no trace: those under
``torch.no_grad``, lipcore's own, the ones that activation checkpointing runs again, those inside transforms of
``torch.func`` (``grad``, ``vmap``, ``jacrev``, ``jvp``) and forward AD, and those that ``torch.jit.trace``,
``torch.export``, ``make_fx`` or fake tensors record.

A backward pass is the training's when it accumulates the gradients of all leaves that it reaches. ``autograd.grad()``
(saliency, attacks, gradient penalties) and ``backward(inputs=...)`` are not: they are counted as unrecorded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lipcore import _core
from lipcore.models.torch_internals import graph_task

#: Whether a forward pass that begins or ends now is the training's.
is_training_forward = _core.is_training_forward

#: Whether what runs now runs as it is written, be it the training's or not.
is_plain_run = _core.is_plain_run

#: Asked in a hook of a backward pass: whether that is the training's.
accumulates_everything = _core.accumulates_everything

#: The number of the backward pass under way, -1 outside.
in_backward = graph_task

#: Why a backward pass does not count.
NOT_ACCUMULATED = "the backward pass did not accumulate all gradients (autograd.grad, or backward(inputs=))"
GRAPH_OF_GRADIENT = (
    "its graph was differentiated with create_graph=True, so gradients flow along other ways too"  # a penalty's, say
)


class _Given(threading.local):
    runs = False


_given = _Given()


@contextmanager
def given_pass() -> Iterator[None]:
    """Run a forward pass that is as the training's and none of them, in this thread: of a batch that the user gives to
    be proved. Only what is to prove it looks at it."""
    _given.runs = True
    try:
        yield
    finally:
        _given.runs = False


def is_given_pass() -> bool:
    """Return whether this thread runs such a pass."""
    return _given.runs


class Untraced:
    """A compiled hook that torch.compile and torch.export leave out of what they trace; inert in a copied model."""

    def __init__(self, hook: Any = None) -> None:
        self._hook = hook

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or self._hook is None:
            return None
        return self._hook(*arguments)

    def __reduce__(self) -> tuple[type[Untraced], tuple[()]]:
        return type(self), ()


class OfTraining(Untraced):
    """A hook of that kind which leaves out passes that are given to be proved."""

    def __call__(self, *arguments: Any) -> Any:
        return None if _given.runs else super().__call__(*arguments)
