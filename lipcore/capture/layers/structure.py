"""Which modules and parameters a model is made of, and whether that has changed since it was looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lipcore.models.names import named_modules


class Structure:
    """The modules and parameters that a model is made of, by name, and which of them are one object.

    New objects in the places of old ones are no change (an optimizer may put them there); a layer that was added,
    removed or replaced is, and a parameter that was tied to another or untied.

    Attributes:
        links: (dict of a module, key, what is there): that nothing has changed where all of these are as they were.
        sizes: (dict of a module, its length): and that nothing was added.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = self._places()
        self._look()

    def _look(self) -> None:
        owners = [owner for _, module in named_modules(self._model) for owner in (module._parameters, module._modules)]
        self.sizes: list[tuple[dict[str, Any], int]] = [(owner, len(owner)) for owner in owners]
        self.links: list[tuple[dict[str, Any], str, Any]] = [
            (owner, key, value) for owner in owners for key, value in owner.items()
        ]

    def _places(self) -> dict[str, tuple[nn.Module, str]]:
        """Return, by parameter's name, the module that holds it and the name of the first place where the same object
        is."""
        first: dict[int, str] = {}
        return {name: (module, first.setdefault(id(parameter), name)) for name, module, parameter in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
        for module_name, module in named_modules(self._model):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{module_name}.{key}" if module_name else key, module, parameter

    def check(self) -> None:
        """Raise ValueError when layers or ties have changed since the model was looked at."""
        if all(len(owner) == size for owner, size in self.sizes) and all(
            owner.get(key) is value for owner, key, value in self.links
        ):
            return
        places = self._places()
        for name in dict.fromkeys((*self._seen, *places)):
            before, now = self._seen.get(name), places.get(name)
            if before is None or now is None or before[0] is not now[0]:
                what = f"'{name}' was {'added' if before is None else 'removed' if now is None else 'replaced'}"
            elif before[1] != now[1]:
                what = f"'{name}' was {'untied' if now[1] == name else f'tied to {now[1]!r}'}"
            else:
                continue
            raise ValueError(
                f"model: {what} after the model was looked at; call Monitor.rebind(), or make a new metric afterwards"
            )
        self._look()
