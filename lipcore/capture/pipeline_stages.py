"""Stages of torch.distributed.pipelining, which divides gradients behind the last backward pass of a step and runs
stages on memory that nobody has written, to learn shapes.

Neither has a hook of torch's: the methods of the stages' class are wrapped while somebody watches.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lipcore.capture.parameters import WeakCall
from lipcore.models.pause import paused
from lipcore.models.torch_internals import STAGE_LEARNS_SHAPES, STAGE_REDUCES, STAGES

_watches: weakref.WeakSet[StageWatch] = weakref.WeakSet()
_wrapped: list[tuple[type, str, Any, Any]] = []  # class, name of a method, what it was, what stands there now
_thread = threading.local()


class StageWatch:
    """Hooks that call `on_gradients` whenever a schedule has done with the gradients of a stage in which modules of
    this model are: when it has reduced and divided them. Passes in which stages learn shapes are recorded by nobody.

    Args:
        model: the module that is watched; it may hold several stages, and a stage may hold it.
    """

    def __init__(self, model: nn.Module, on_gradients: Callable[[], None]) -> None:
        self._model, self._on_gradients = weakref.ref(model), WeakCall(on_gradients)
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        _watches.add(self)
        self.look()

    def look(self) -> None:
        """Wrap the methods of stages, where there may be any by now."""
        if not _wrapped and (STAGES in sys.modules or _several_ranks()):
            _wrap()

    def reduced(self, stage: Any) -> None:
        """Learn that a schedule has done with the gradients of a stage."""
        holds = self._known.get(stage)
        if holds is None:
            holds = self._known[stage] = self._holds(stage.submod)
        if holds:
            self._on_gradients()

    def _holds(self, module: nn.Module) -> bool:
        model = self._model()
        return model is not None and not {id(m) for m in model.modules()}.isdisjoint(id(m) for m in module.modules())

    def close(self) -> None:
        """Give stages their own methods back, where nobody else watches."""
        _watches.discard(self)
        if not _watches:
            _unwrap()


def _several_ranks() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _wrap() -> None:
    with suppress(ImportError):
        from torch.distributed.pipelining import PipelineStage

        for names, wrapper in ((STAGE_REDUCES, _reducing), (STAGE_LEARNS_SHAPES, _learning)):
            for kind in PipelineStage.__mro__:
                for name in names:
                    if name in vars(kind):
                        before = vars(kind)[name]
                        after = wrapper(before)
                        setattr(kind, name, after)
                        _wrapped.append((kind, name, before, after))


def _unwrap() -> None:
    for kind, name, before, after in _wrapped:
        if vars(kind).get(name) is after:  # else others have wrapped it since; without watches ours does nothing
            setattr(kind, name, before)
    _wrapped.clear()


def _reducing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def reduce(stage: Any, *arguments: Any, **keywords: Any) -> Any:
        outermost = not getattr(_thread, "reduces", False)  # one of these methods calls the other
        _thread.reduces = True
        try:
            result = method(stage, *arguments, **keywords)
        finally:
            _thread.reduces = not outermost
        for watch in list(_watches) if outermost else ():
            watch.reduced(stage)
        return result

    return reduce


def _learning(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def learn(*arguments: Any, **keywords: Any) -> Any:
        with paused():
            return method(*arguments, **keywords)

    return learn
