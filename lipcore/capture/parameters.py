"""Hooks for metrics of parameters: gradients after every backward pass, weights loaded from outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lipcore import _core
from lipcore.models.ranks import under_process_group
from lipcore.models.torch_internals import queue_callback


class WeakCall:
    """A hook that keeps nothing alive, and that does nothing in a copied or pickled model."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else lambda: None

    def __call__(self, *arguments: Any) -> Any:
        method = self._method()
        return method(*arguments) if method is not None else None

    def __reduce__(self) -> tuple[type[WeakCall], tuple[()]]:
        return WeakCall, ()


class LoadWatch:
    """Hooks that call `before_load` and `on_load` once around load_state_dict() of the model or of any module in it,
    however many modules below are loaded with it."""

    def __init__(self, model: nn.Module, before_load: Callable[[], None], on_load: Callable[[], None]) -> None:
        self._before_load, self._on_load = before_load, on_load
        self._loading: list[int] = []
        begin, end = WeakCall(self._begin), WeakCall(self._end)
        self._handles: list[Any] = []
        for module in model.modules():
            self._handles.append(module.register_load_state_dict_pre_hook(begin))
            self._handles.append(module.register_load_state_dict_post_hook(end))

    def _begin(self, module: nn.Module, *_: Any) -> None:
        self._forget(module)  # an earlier load was broken off by an exception
        if not self._loading:
            self._before_load()
        self._loading.append(id(module))

    def _end(self, module: nn.Module, *_: Any) -> None:
        self._forget(module)
        if not self._loading:
            self._on_load()

    def _forget(self, module: nn.Module) -> None:
        if id(module) in self._loading:
            del self._loading[self._loading.index(id(module)) :]

    def close(self) -> None:
        """Remove the hooks from every module."""
        for handle in self._handles:
            handle.remove()


class GradientWatch:
    """Hooks that call `on_begin` and `on_gradients` once at the beginning and at the end of every backward pass that
    reached one of the parameters: when the first of them gets its gradient, and when all have."""

    def __init__(
        self, parameters: Iterable[Tensor], on_gradients: Callable[[], None], on_begin: Callable[[], None]
    ) -> None:
        self._on_gradients, self._on_begin = on_gradients, on_begin
        self._hook = _core.BackwardHook(WeakCall(self._begin))
        self._handles = [p.register_post_accumulate_grad_hook(self._hook) for p in parameters if p.requires_grad]

    @staticmethod
    def is_ours(hook: Any) -> bool:
        """Return whether a parameter's hook belongs to such a watch, and so leaves the gradient alone."""
        return isinstance(hook, _core.BackwardHook)

    def _begin(self) -> None:
        self._on_begin()
        # DDP finishes its all-reduce in a callback of its own, which may stand behind this one.
        reduced = under_process_group()
        queue_callback(self._end if reduced else self._finish)

    def _end(self) -> None:
        queue_callback(self._finish)

    def _finish(self) -> None:
        self._hook.forget()
        self._on_gradients()

    def close(self) -> None:
        """Remove the hooks from every parameter."""
        for handle in self._handles:
            handle.remove()
