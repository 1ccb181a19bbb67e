"""What `input=` names in a model: a module of it, or a part of what it takes."""

from __future__ import annotations

from torch import nn

from lipcore.models.affine import is_affine
from lipcore.models.chains import altered_modules, first_of_chain
from lipcore.models.inputs import InputChoice
from lipcore.models.named_output import module_called


def find_input(model: nn.Module, choice: InputChoice | None) -> tuple[str, InputChoice | None]:
    """Return the name of the first layer and the choice of the input that lambda is the gradient at; "" or None stands
    for what is not named. A module goes before an argument of the same name."""
    name = module_called(model, choice, "input") if isinstance(choice, str) else None
    return (name, None) if name is not None else ("", choice)


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
