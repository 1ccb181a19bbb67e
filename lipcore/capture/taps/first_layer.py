"""Which layer is the first? Where the model's structure does not tell: the first one that runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.proof import is_proof
from lipcore.capture.taps.collector import Collector, inert_collector
from lipcore.capture.taps.forward_hook import ForwardHook, inert_hook
from lipcore.capture.training_pass import in_backward, is_plain_run
from lipcore.models.chains import FIRST_LAYER_TYPES
from lipcore.models.names import named_modules


class FirstLayerFinder:
    """The search for the first layer that runs: it hooks every candidate, and the first to run gets the hook that was
    meant for the first layer."""

    def __init__(self, hook: ForwardHook, collector: Collector, handles: list[Any]) -> None:
        self._hook = hook
        self._collector = collector
        self._handles = handles  # where the hook's handle goes
        self._candidates: list[Any] = []
        self._early: tuple[str, nn.Module] | None = None  # the first candidate of a forward pass that ran without grad

    def __reduce__(self) -> tuple[Callable[[], FirstLayerFinder], tuple[()]]:
        return _inert_finder, ()

    def look_in(self, model: nn.Module) -> None:
        candidates = [(n, m) for n, m in named_modules(model) if isinstance(m, FIRST_LAYER_TYPES)]
        if not candidates:
            reason = "the model has no Linear, Conv1d, Conv2d, Conv3d or Embedding to be its first layer"
            site = self._hook.site
            if not site.optional:
                raise ValueError(f"input: {reason}; name a module with input='<module>'")
            self._collector.lose(site, reason)
            return
        self._collector.unresolved = self._hook.site
        self._candidates = [
            module.register_forward_hook(functools.partial(self._ran, name)) for name, module in candidates
        ]

    @property
    def found(self) -> bool:
        return self._hook.site.module is not None

    def begin_forward(self) -> None:
        self._early = None

    def close(self) -> None:
        """Take the hooks off the candidates."""
        for handle in self._candidates:
            handle.remove()
        self._candidates = []

    def _ran(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        collector = self._collector
        if self.found or torch.compiler.is_compiling() or not collector.tapping or not is_plain_run():
            return None
        if is_proof():  # a checkpoint runs forward again, in a backward pass that is not the training's
            return None
        inside = collector.under_way.micro is not None
        if not torch.is_grad_enabled():
            if inside and self._early is None:
                self._early = name, module
            return None
        first = name, module
        if self._early is not None:
            # A reentrant checkpoint runs without grad and again in the backward pass; what is under no_grad does not.
            recomputed = in_backward() != -1 or any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
            first = self._early if recomputed else first
        elif not inside and in_backward() == -1:
            return None
        try:
            self._hook.site.resolve(*first)
        except ValueError as error:
            collector.fail(error)
            return None
        collector.unresolved = None
        # The model itself has a hook already that ends its forward pass.
        self._handles.append(first[1].register_forward_hook(self._hook.after_forward, prepend=not first[0]))
        return self._hook.after_forward(module, arguments, output) if first[1] is module else None


def _inert_finder() -> FirstLayerFinder:
    return FirstLayerFinder(inert_hook(), inert_collector(), [])
