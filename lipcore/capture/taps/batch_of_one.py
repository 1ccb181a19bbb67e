"""Batches of one: their numbers are read from two bias gradients, without any tap, where that is sure to be right.

The compiled hooks (csrc/batch_of_one/bias_gradients.h) decide before every forward pass how it is observed, and check
themselves against the taps now and then.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from lipcore import _core
from lipcore.capture.taps.collector import Collector
from lipcore.capture.taps.tap import SingleSample
from lipcore.models.affine import is_affine
from lipcore.models.chains import chain_of


def ends_of_chain(model: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """Return the first and last Linear of a plain chain whose biases' gradients tell all about a single sample; None
    where that is not sure."""
    modules = [module for _, module in chain_of(model)]
    if len(modules) < 2 or model._forward_hooks or model._forward_pre_hooks:
        return None
    first, last = modules[0], modules[-1]
    if type(first) is not nn.Linear or type(last) is not nn.Linear or last.out_features != 1:
        return None
    if not is_affine(first) or not is_affine(last):
        return None
    if first.bias is None or last.bias is None or not first.bias.requires_grad:
        return None  # a frozen bias has no gradient to hook
    uses = [p for module in modules for p in module.parameters() if p is first.bias or p is last.bias]
    return (first, last) if len(uses) == 2 else None


def shortcut_hooks(
    ends: tuple[nn.Linear, nn.Linear],
    into: SingleSample,
    collector: Collector,
    hook_taps: Callable[[], None],
    unhook_taps: Callable[[], None],
) -> Any:
    """Return the compiled hooks, yet to be registered. They call `hook_taps` when a batch comes that they cannot
    serve."""
    before = -1

    def changed(way: int) -> bool:
        """Change to another way of observing passes; return False, changing nothing, where gradients of an earlier pass
        are still to come to the same biases."""
        nonlocal before
        if way in (_core.SERVED, _core.CHECKED) and collector.waits:
            return False
        collector.tapping = collector.recording and way != _core.SERVED
        collector.compares = way == _core.CHECKED
        if way == _core.SERVED:
            if before == _core.CHECKED:
                unhook_taps()  # they were there for one sample
            into.on_served()
        elif collector.tapping:
            hook_taps()
        before = way
        return True

    def checked(r: float, local_lipschitz: float) -> bool:
        return collector.recording and into.agrees(r, local_lipschitz)

    return _core.SingleSampleHooks(
        *(*ends, into.distributions),
        on_change=changed,
        on_check=checked,
        on_error=collector.fail,
    )


def _inert_hooks() -> Any:
    """Return hooks that do nothing, which a copied model gets in the place of the compiled ones."""
    layer = SimpleNamespace(_parameters={}, _forward_hooks={}, bias=None)
    never = functools.partial(bool, False)
    distributions = [_core.Distribution() for _ in range(3)]
    return _core.SingleSampleHooks(layer, layer, distributions, on_change=never, on_check=never, on_error=never)


copyreg.pickle(_core.SingleSampleHooks, lambda hooks: (_inert_hooks, ()))
