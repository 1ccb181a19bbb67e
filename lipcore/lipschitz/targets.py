"""Targets that `input=` and `output=` name in a model: a module of it, or a part of what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lipcore.models.affine import is_affine
from lipcore.models.chains import altered_modules, chain_of, first_of_chain
from lipcore.models.inputs import InputChoice
from lipcore.models.names import find_module, unwrap


def find_input(model: nn.Module, choice: InputChoice | None) -> tuple[str, InputChoice | None]:
    """Return the name of the first layer and the choice of the input that lambda is the gradient at; "" or None stands
    for what is not named. A module goes before an argument of the same name."""
    name = _module_of(model, choice, "input") if isinstance(choice, str) else None
    return (name, None) if name is not None else ("", choice)


def find_output(
    model: nn.Module, choice: str | Callable[[Any], Any] | None
) -> tuple[str, str | Callable[[Any], Any] | None]:
    """Return the name of the module whose output is meant, "" for the model itself, and the choice of a part of that
    output."""
    name = _module_of(model, choice, "output") if isinstance(choice, str) else None
    return (name, None) if name is not None else ("", choice)


def _module_of(model: nn.Module, name: str, argument: str) -> str | None:
    """Return the canonical name of the module of this name; None where the name may be a part of what the model takes
    or returns. A plain chain has no such parts, so there a name without a module is an error."""
    try:
        return find_module(model, name, argument)[0]
    except ValueError:
        if chain_of(unwrap(model)):
            raise
        return None


def begins_with_layer(model: nn.Module) -> bool:
    """Return whether the model is a plain chain that gives its input to a first layer as it is."""
    first = first_of_chain(model)
    if first is None:
        return False
    altered = altered_modules(model)
    above = {"every module", "the model's wrapper", "the model"}
    parts = first[0].split(".")
    above |= {f"module '{'.'.join(parts[:i])}'" for i in range(1, len(parts))}
    return is_affine(first[1]) and not above.intersection(altered)
