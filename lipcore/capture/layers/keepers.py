"""The modules that keep their tensors inside checkpoints, since the graph measures parameters there."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from lipcore.capture.graph.kept_tensors import KeptTensors, under_hooks
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.passes import Passes
from lipcore.capture.parameters import WeakCall
from lipcore.capture.training_pass import Untraced, in_backward, is_training_forward

_NUMBERS = re.compile(r"\b\d+\b")
_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


class Keepers:
    """The hooks before and after the modules inside which parameters without a rule are used: at first those that own
    them, then what is around these, until all nodes are inside that may be run again.

    Args:
        model: the module that is called.
        coverage: which parameters the graph measures.
        passes: the forward passes under way.
        max_bytes: what one pass may keep.
    """

    def __init__(self, model: nn.Module, coverage: ParameterCoverage, passes: Passes, max_bytes: int) -> None:
        self._model, self._coverage, self._passes, self._max_bytes = model, coverage, passes, max_bytes
        self._at: dict[str, str] = {}  # parameter -> the name of the module
        self._handles: dict[str, list[Any]] = {}
        self._outside: set[str] = set()  # names of modules that were called where no hooks are
        self._open: list[tuple[nn.Module, Any]] = []

    def attach(self) -> None:
        """Put hooks on the modules that own parameters which the graph measures."""
        for name in self._coverage.by_graph:
            self._put(name, _around(self._model, name.rpartition(".")[0]))

    def detach(self) -> None:
        """Take all hooks off."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles, self._at = {}, {}

    def widen(self, name: str) -> bool:
        """Have more modules keep their tensors for a parameter; return False where none is left inside a checkpoint,
        or the last pass kept all that it may."""
        at = self._at.get(name)
        if self._full:
            return False
        if at is None:
            self._put(name, _around(self._model, name.rpartition(".")[0]))
            return True
        alike = [path for path in _alike(self._model, at) if path not in self._handles]
        for path in alike:  # a position bias is used in every layer, and owned by the first
            self._put(name, path)
        if alike:
            self._at[name] = at
            return True
        if not at or at in self._outside:
            return False
        self._put(name, _around(self._model, at.rpartition(".")[0]))
        return True

    def why(self, why: str) -> str:
        """Return why parameters inside a checkpoint are not measured, with the bound where that is met."""
        if not self._full:
            return why
        return f"{why}, or raise max_replay_bytes={self._max_bytes:,}, which is less than what is to be kept there"

    @property
    def _full(self) -> bool:
        run = self._passes.last
        return run is not None and run.kept is not None and run.kept.full

    def _put(self, name: str, at: str) -> None:
        self._at[name] = at
        if at not in self._handles:
            module = self._model.get_submodule(at)
            before = Untraced(functools.partial(WeakCall(self._before), at))
            self._handles[at] = [
                module.register_forward_pre_hook(before, prepend=True),
                module.register_forward_hook(Untraced(WeakCall(self._after)), always_call=True),
            ]

    def _before(self, at: str, module: nn.Module, *_: Any) -> None:
        run = self._passes.current
        if run is None or in_backward() != -1 or not is_training_forward():
            return
        if run.kept is None:
            parameters = self._coverage.parameters()
            run.kept = KeptTensors(self._max_bytes, {p.untyped_storage().data_ptr() for _, p in parameters})
        (self._outside.discard if under_hooks() else self._outside.add)(at)
        hooks = run.kept.hooks()
        if hooks is not None:
            hooks.__enter__()
            self._open.append((module, hooks))

    def _after(self, module: nn.Module, *_: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _around(model: nn.Module, path: str) -> str:
    """Return the name of the module at a path, or of the first around it that is called as a whole."""
    parts = path.split(".") if path else []
    if "parametrizations" in parts:  # whose tensor the module around uses
        parts = parts[: parts.index("parametrizations")]
    while parts and isinstance(model.get_submodule(".".join(parts)), _NEVER_CALLED):
        parts.pop()
    return ".".join(parts)


def _alike(model: nn.Module, path: str) -> list[str]:
    """Return the names of the modules that differ from this one in numbers alone: the same place in other blocks."""
    wanted = _NUMBERS.sub("#", path)
    return [name for name, _ in model.named_modules() if _NUMBERS.sub("#", name) == wanted]


def _nothing() -> None:
    return None
