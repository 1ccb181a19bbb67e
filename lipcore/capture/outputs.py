"""What modules return in the training's forward passes: hooks that are on the modules only while they are wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lipcore import _core
from lipcore.capture.parameters import WeakCall
from lipcore.capture.training_pass import OfTraining, in_backward, is_training_forward
from lipcore.models.names import named_modules
from lipcore.models.torch_internals import compiles_its_call, is_compiled, original

_INSIDE = "is inside a compiled module, whose outputs no hook sees"
_IN_PLACE = "was compiled in place by model.compile(), so no hook sees its output; use torch.compile(module) instead"
_NO_CALL = "the model is a dict or list of modules, which has no forward pass of its own"


def hookable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the modules whose outputs hooks see, by canonical name, "" for the model as the loop calls it; and why the
    others' are not seen."""
    seen: dict[str, nn.Module] = {}
    unseen: dict[str, str] = {}
    wrappers = {id(original(module)): module for module in model.modules() if original(module) is not module}
    inside = {
        id(below)
        for module in model.modules()
        if is_compiled(module)
        for below in original(module).modules()
        if below is not original(module)
    }
    has_call = is_called(model)
    for name, module in named_modules(model):
        at = model if not name else wrappers.get(id(module), module)
        if not has_call:
            unseen[name] = _NO_CALL
        elif compiles_its_call(at):
            unseen[name] = _IN_PLACE
        elif id(module) in inside:
            unseen[name] = _INSIDE
        elif is_called(module):
            seen[name] = at
    return seen, unseen


def is_called(module: nn.Module) -> bool:
    """Return whether a module has a forward pass of its own, unlike nn.ModuleList and nn.ModuleDict."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


class OutputWatch:
    """Hooks that hand on what modules return in forward passes of the training. They are on the modules only in the
    passes that are wanted, from their beginning to their end: what a checkpoint runs again in the backward pass does
    not come, nor do other threads' passes.

    Args:
        model: the module the loop calls.
        names: of the modules; names that hooks cannot see are passed over.
        wanted: asked when a forward pass begins.
        observe: gets name, module and output.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        wanted: Callable[[], bool],
        observe: Callable[[str, nn.Module, Any], None],
    ) -> None:
        seen, _ = hookable(model)
        self._modules: Mapping[str, nn.Module] = {name: seen[name] for name in names if name in seen}
        self._root = "" in self._modules
        self._wanted, self._observe = wanted, observe
        self._on_modules: list[Any] = []
        self._thread = 0  # that runs the pass under way; 0 for none
        self._handles: list[Any] = []
        if self._modules:
            self._handles = [
                model.register_forward_pre_hook(OfTraining(WeakCall(self._begin))),
                model.register_forward_hook(OfTraining(WeakCall(self._end)), always_call=True),
            ]

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if _core.paused():  # a pass of lipcore's own, which may be within the training's
            return
        if self._thread and self._thread != threading.get_ident() and _is_alive(self._thread):
            return
        self._take_off()  # of a pass that was broken off: nothing tells of a KeyboardInterrupt
        if not is_training_forward() or not self._wanted():
            return
        self._thread = threading.get_ident()
        self._on_modules = [
            at.register_forward_hook(_Hook(WeakCall(self._came), name)) for name, at in self._modules.items() if name
        ]

    def _end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self._thread or _core.paused():
            return
        self._take_off()
        if self._root and output is not None and is_training_forward():  # None: it has raised
            self._observe("", module, output)

    def _came(self, name: str, module: nn.Module, output: Any) -> None:
        # A checkpoint inside a backward pass of the model's own runs again what has come already.
        if threading.get_ident() == self._thread and in_backward() == -1 and not _core.paused():
            self._observe(name, module, output)

    def _take_off(self) -> None:
        for handle in self._on_modules:
            handle.remove()
        self._on_modules, self._thread = [], 0

    def close(self) -> None:
        """Remove the hooks."""
        self._take_off()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _is_alive(thread: int) -> bool:
    return any(each.ident == thread for each in threading.enumerate())


class _Hook:
    """The hook on one module: left out of what is compiled, inert in a copied model."""

    def __init__(self, came: WeakCall | None = None, name: str = "") -> None:
        self._came, self._name = came, name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._came is not None and not torch.compiler.is_compiling():
            self._came(self._name, module, output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
