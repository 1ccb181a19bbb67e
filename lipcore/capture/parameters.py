"""Hooks for metrics of parameters: gradients after every backward pass, weights loaded from outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Variable


class _Call:
    """A hook that keeps nothing alive, and that does nothing in a copied or pickled model."""

    def __init__(self, method: Callable[[], None] | None = None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else lambda: None

    def __call__(self, *_: Any) -> None:
        if (method := self._method()) is not None:
            method()

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return _Call, ()


class LoadWatch:
    """Calls `on_load` after load_state_dict() of the model or of any module in it."""

    def __init__(self, model: nn.Module, on_load: Callable[[], None]) -> None:
        self._on_load = on_load
        call = _Call(self._loaded)
        self._handles = [module.register_load_state_dict_post_hook(call) for module in model.modules()]

    def _loaded(self) -> None:
        self._on_load()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class GradientWatch:
    """Calls `on_gradients` once at the end of every backward pass that reached one of the parameters."""

    def __init__(self, parameters: Iterable[Tensor], on_gradients: Callable[[], None]) -> None:
        self._on_gradients = on_gradients
        self._queued = False
        call = _Call(self._accumulated)
        self._handles = [p.register_post_accumulate_grad_hook(call) for p in parameters if p.requires_grad]

    def _accumulated(self) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        # DDP finishes its all-reduce in a callback of its own, which may stand behind this one.
        Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self._queued = False
        self._on_gradients()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
