"""Whether a model's modules are still those whose parameters are watched."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleLinks:
    """Places of all modules in their parents. A parameter is looked up in its module at every step; a module that was
    replaced as a whole (``model[0] = nn.Linear(...)``) would be watched on as an orphan."""

    def __init__(self, model: object) -> None:
        self._links: list[tuple[Any, str, nn.Module]] = []
        for module in model.modules() if isinstance(model, nn.Module) else ():
            children = module._modules
            self._links += [(children, key, child) for key, child in children.items() if child is not None]

    def are_intact(self) -> bool:
        """Return whether every module stands where it stood."""
        return all(children.get(key) is child for children, key, child in self._links)
