"""Trainable parameters that nobody watches: added, unfrozen or untied since a Trajectory was bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.trajectory.module_links import ModuleLinks
from lipcore.trajectory.parameters import WatchedParameter, trainable


class Inventory:
    """Finder of the trainable parameters of a model that are not watched.

    It is asked whenever a window closes, so what the model held when nothing was missing is kept: as long as no module
    has got another child or another parameter, and no tensor beside the watched ones has changed, nothing can be.

    Args:
        model: the module.
        watched: the parameters that are watched in it.
    """

    def __init__(self, model: nn.Module, watched: list[WatchedParameter]) -> None:
        self._model, self._watched = model, watched
        self._where = {(id(parameter.owner), parameter.key) for parameter in watched}
        self._links: ModuleLinks | None = None  # None: not known to be complete
        self._sizes: list[tuple[dict[str, Any], int]] = []  # of every module's children and parameters
        self._others: list[tuple[dict[str, Any], str, Tensor | None, bool]] = []  # and whether each requires grad

    def unwatched(self) -> list[str]:
        """Return the names of trainable parameters that are neither watched nor tied to one that is."""
        if self._links is not None and self._is_as_it_was(self._links):
            return []
        missing = self._look()
        self._links = None if missing else self._remember()
        return missing

    def _look(self) -> list[str]:
        held = {id(tensor) for one in self._watched for tensor in (one.owner.get(one.key), one.shadow)}
        names = {parameter.own_name for parameter in self._watched}
        return [
            name
            for owner, key, name in trainable(self._model)
            if (id(owner), key) not in self._where and id(owner[key]) not in held and name not in names
        ]

    def _remember(self) -> ModuleLinks:
        holders = {id(one.owner.get(one.key)): one for one in self._watched}
        self._sizes, self._others = [], []
        for module in self._model.modules():
            self._sizes += [(held, len(held)) for held in (module._modules, module._parameters)]
            for key, tensor in module._parameters.items():
                if (id(module._parameters), key) in self._where:
                    continue  # looked up at every step
                self._others.append((module._parameters, key, tensor, tensor is not None and tensor.requires_grad))
                if (tied := holders.get(id(tensor))) is not None:
                    self._others.append((tied.owner, tied.key, tensor, True))
        return ModuleLinks(self._model)

    def _is_as_it_was(self, links: ModuleLinks) -> bool:
        return (
            all(len(held) == size for held, size in self._sizes)
            and links.are_intact()
            and all(
                owner.get(key) is tensor and (tensor is None or tensor.requires_grad == flag)
                for owner, key, tensor, flag in self._others
            )
        )
