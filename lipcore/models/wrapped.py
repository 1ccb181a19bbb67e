"""Wrappers that a trainer has put around a model which is watched inside of them."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

from torch import nn

_wrappers: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()


def note_wrapper(model: nn.Module, wrapper: object) -> None:
    """Remember what a trainer calls in a model's place, where that holds the model: it says whose samples are in the
    gradient."""
    if isinstance(wrapper, nn.Module) and wrapper is not model and any(one is model for one in wrapper.modules()):
        _wrappers[model] = ref(wrapper)


def outermost(model: nn.Module) -> nn.Module:
    """Return what a trainer calls in a model's place, as far as that is known; else the model."""
    found = _wrappers.get(model)
    wrapper = None if found is None else found()
    return model if wrapper is None else wrapper
