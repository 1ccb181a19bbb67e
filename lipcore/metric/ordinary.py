"""Tensors that may be written to later, whatever mode the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def ordinary(function: F) -> F:
    """Make a function leave no inference tensors behind when it is called under torch.inference_mode: the next step,
    outside, could not write to them."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **keywords)
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments, **keywords)

    call.is_ordinary = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def make_ordinary(kind: type, names: frozenset[str]) -> None:
    """Do so for the methods of a class that it defines itself."""
    for name in names & vars(kind).keys():
        method = vars(kind)[name]
        if callable(method) and not hasattr(method, "is_ordinary"):
            setattr(kind, name, ordinary(method))
