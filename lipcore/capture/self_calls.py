"""Calls of a model inside its own forward pass (trees, two views of a batch), which are parts of the pass under way."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any, Generic, TypeVar

from torch import nn

from lipcore.models.outputs import nodes_of, tensors_of
from lipcore.models.torch_internals import calls_itself

IN_ANOTHER_THREAD = (
    "the model's forward pass calls the model itself in another thread, and lipcore takes that for a pass of its own; "
    "make these calls in the thread of the forward pass"
)
_MARK = "lipcore: the passes that have returned it"  # in the metadata of a node of the graph
_numbers = itertools.count()
Pass = TypeVar("Pass")


class SelfCalls:
    """Counter of such calls that are under way in one pass."""

    def __init__(self) -> None:
        self._inside = 0

    def goes_on(self, model: nn.Module) -> bool:
        """Return whether a call of the model that begins now, while the pass is under way, is one."""
        if not calls_itself(model):
            return False
        self._inside += 1
        return True

    def goes_back(self) -> bool:
        """Return whether a call of the model that ends now was one."""
        if not self._inside:
            return False
        self._inside -= 1
        return True


class OtherThreads(Generic[Pass]):
    """The forward passes of one model that are under way in all threads, by which those are found that another thread's
    has called: what they returned is in its graph."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Of each pass under way, by its id: the pass, and those that have ended meanwhile, by number. Not a
        #: WeakKeyDictionary, whose iterations and callbacks are Python code that every pass would run.
        self._within: dict[int, tuple[weakref.ref[Pass], dict[int, Pass]]] = {}

    def begin(self, run: Pass) -> None:
        """Note that a pass begins."""
        with self._lock:
            if self._within:  # of other threads, or never ended
                self._within = {key: each for key, each in self._within.items() if each[0]() is not None}
            self._within[id(run)] = weakref.ref(run), {}

    def end(self, run: Pass, output: Any) -> list[Pass]:
        """Note that a pass has returned this, and return those that it has called; None as output: it has raised."""
        with self._lock:
            _, ended = self._within.pop(id(run), (None, {}))
            number = next(_numbers)
            others = list(self._within.values()) if output is not None else []
            for _, within in others:
                within[number] = run
        for tensor in tensors_of(output) if others else ():
            if tensor.grad_fn is not None:
                notes: Any = tensor.grad_fn.metadata
                notes.setdefault(_MARK, []).append(number)
        if not ended or output is None:
            return []
        found = {number for node in nodes_of(output) for number in node.metadata.get(_MARK, ())}
        return [each for number, each in ended.items() if number in found]
