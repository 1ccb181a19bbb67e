"""The modules that keep their tensors inside checkpoints, since the graph measures parameters there."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from lipcore.capture.graph.kept_tensors import KeptTensors, under_hooks
from lipcore.capture.graph.own_graph import OwnGraph
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.other_outputs import has_used_others
from lipcore.capture.layers.passes import Passes
from lipcore.capture.parameters import WeakCall
from lipcore.capture.training_pass import Untraced, in_backward, is_training_forward
from lipcore.models.dtensors import local_of
from lipcore.models.names import named_modules

_NUMBERS = re.compile(r"\b\d+\b")
_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


class _Called(NamedTuple):
    """One call of a module, until the end of the forward pass."""

    module: nn.Module
    rule: OwnGraph
    saved: tuple[Tensor, ...]
    extra: Any
    output: Any


class Keepers:
    """The hooks before and after the modules inside which parameters without a rule are used: at first those that own
    them, then what is around these, until all nodes are inside that may be run again.

    Args:
        model: the module that is called.
        coverage: which parameters the graph measures.
        passes: the forward passes under way.
        max_bytes: what one pass may keep.
        max_flops: as of :class:`OwnGraph`.
    """

    def __init__(
        self,
        model: nn.Module,
        coverage: ParameterCoverage,
        passes: Passes,
        max_bytes: int,
        max_flops: int | None,
    ) -> None:
        self._coverage, self._passes = coverage, passes
        self._max_bytes, self._max_flops = max_bytes, max_flops
        self._modules = dict(named_modules(model))
        self._at: dict[str, str] = {}  # parameter -> the name of the module
        self._handles: dict[str, list[Any]] = {}
        self._outside: set[str] = set()  # names of modules that were called where no hooks are
        self._called: dict[str, _Called] = {}  # in this pass, for the first time under hooks
        self._tried: set[str] = set()
        self._calls: Counter[str] = Counter()  # that kept their tensors, in this pass
        self._open: list[tuple[nn.Module, Any]] = []

    def attach(self) -> None:
        """Put hooks on the modules that own parameters which the graph measures."""
        for name in self._coverage.by_graph:
            self._put(name, _around(self._modules, name.rpartition(".")[0]))

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
            self._put(name, _around(self._modules, name.rpartition(".")[0]))
            return True
        alike = [path for path in _alike(self._modules, at) if path not in self._handles]
        for path in alike:  # a position bias is used in every layer, and owned by the first
            self._put(name, path)
        if alike:
            self._at[name] = at
            return True
        if not at or at in self._outside:
            return False
        self._put(name, _around(self._modules, at.rpartition(".")[0]))
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
            module = self._modules[at]
            before = Untraced(functools.partial(WeakCall(self._before), at))
            after = Untraced(functools.partial(WeakCall(self._after), at))
            self._handles[at] = [
                module.register_forward_pre_hook(before, prepend=True),
                module.register_forward_hook(after, always_call=True, with_kwargs=True),
            ]

    def _before(self, at: str, module: nn.Module, *_: Any) -> None:
        run = self._passes.current
        if run is None or in_backward() != -1 or not is_training_forward():
            return
        if run.kept is None:
            # Of sharded parameters the part that is here.
            here = [local_of(p) for _, p in self._coverage.parameters()]
            run.kept = KeptTensors(self._max_bytes, {p.untyped_storage().data_ptr() for p in here})
        (self._outside.discard if under_hooks() else self._outside.add)(at)
        hooks = run.kept.hooks()
        if hooks is not None:
            hooks.__enter__()
            self._open.append((module, hooks))

    def _after(self, at: str, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        if not self._open or self._open[-1][0] is not module:
            return
        self._open.pop()[1].__exit__(None, None, None)
        run = self._passes.current
        if run is None or output is None:
            return
        self._calls[at] += 1
        if at in self._tried:
            return
        self._tried.add(at)
        own = tuple(name.rpartition(".")[2] for name in self._coverage.by_graph if name.rpartition(".")[0] == at)
        trained = {key for key, p in module._parameters.items() if p is not None and p.requires_grad}
        inside = any(True for child in module.children() for _ in child.parameters())
        if inside or set(own) != trained:
            return
        rule = OwnGraph(module, own, self._max_bytes, self._max_flops)
        with suppress(ValueError):
            saved, extra = rule.save(module, arguments, keywords, run.batch)
            self._called[at] = _Called(module, rule, saved, extra, output)

    def own_graphs(
        self, returned: Any, uses_of: Callable[[], Mapping[str, int]]
    ) -> Iterator[tuple[str, nn.Module, OwnGraph, dict[str, str]]]:
        """Yield name, module, rule and parameters' names of modules whose calls need to keep nothing in later passes,
        since they can be run again in the backward pass.

        Args:
            returned: by the model in that pass. Modules of which it has used more than their first output go on keeping
                their tensors.
            uses_of: called once, where there are any: returns the uses of each parameter in the pass that has just
                ended.
        """
        called, calls = dict(self._called), Counter(self._calls)
        self._called.clear()
        self._calls.clear()
        if not called:
            return
        uses = uses_of()
        for at, (module, rule, saved, extra, output) in called.items():
            names = {key: f"{at}.{key}" if at else key for key in rule.keys}
            if any(self._at.get(name) != at for name in names.values()):
                continue
            if has_used_others(output, returned):
                continue
            why, each = rule.refusal(module, output, extra, saved)
            if not why and all(uses.get(name) == calls[at] * each.get(key, 0) for key, name in names.items()):
                yield at, module, rule, names

    def keep_again(self) -> None:
        """Have modules keep their tensors again whose parameters the graph is to measure after all."""
        for name in self._coverage.by_graph:
            at = self._at.get(name)
            if at is not None and at not in self._handles:
                self._put(name, at)

    def leave(self, at: str) -> None:
        """Keep nothing in a module any more."""
        for handle in self._handles.pop(at, []):
            handle.remove()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _around(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return the name of the module at a path, or of the first around it that is called as a whole."""
    parts = path.split(".") if path else []
    if "parametrizations" in parts:  # whose tensor the module around uses
        parts = parts[: parts.index("parametrizations")]
    while parts and isinstance(modules[".".join(parts)], _NEVER_CALLED):
        parts.pop()
    return ".".join(parts)


def _alike(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the names of the modules that differ from this one in numbers alone: the same place in other blocks."""
    wanted = _NUMBERS.sub("#", path)
    return [name for name in modules if _NUMBERS.sub("#", name) == wanted]


def _nothing() -> None:
    return None
