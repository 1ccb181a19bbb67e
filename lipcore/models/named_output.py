"""The output that `output=` names: of a module inside a model, or a part of what the model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lipcore.models.chains import chain_of
from lipcore.models.names import find_module, unwrap

#: A module's canonical name, or a key or attribute of what the model returns, or a function of that.
OutputChoice = str | Callable[[Any], Any]


def check_output_choice(choice: Any) -> None:
    """Raise TypeError where `output=` is no such choice."""
    if choice is not None and not isinstance(choice, str) and not callable(choice):
        raise TypeError(f"output: expected the name of a module, a key or a function, got {choice!r}")


def find_output(model: nn.Module, choice: OutputChoice | None) -> tuple[str, OutputChoice | None]:
    """Return the name of the module whose output is meant, "" for the model itself, and the choice of a part of that
    output."""
    name = module_called(model, choice, "output") if isinstance(choice, str) else None
    return (name, None) if name is not None else ("", choice)


def module_called(model: nn.Module, name: str, argument: str) -> str | None:
    """Return the canonical name of the module of this name; None where the name may be a part of what the model takes
    or returns. A plain chain has no such parts, so there a name without a module is an error."""
    try:
        return find_module(model, name, argument)[0]
    except ValueError:
        if chain_of(unwrap(model)):
            raise
        return None
