"""What reduces the gradients of a model over ranks: by which rule, and where they are meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lipcore.models.dtensors import local_of
from lipcore.models.gathered import fully_sharded
from lipcore.models.ranks import under_process_group
from lipcore.models.torch_internals import ddp_of, fsdp_groups, gradients_of, reduces_by_own_rule

_OWN_RULE = (
    "the {0} was given a rule of its own by which gradients are reduced (a communication hook, another divisor), so "
    "that nobody knows whose mean they are; leave that out"
)


class Reduction:
    """The modules of a model that reduce gradients, as a first backward pass finds them; none where there is no process
    group. No collective in any of its answers."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._found: list[nn.Module] | None = None

    @property
    def _modules(self) -> list[nn.Module]:
        if self._found is None:
            if self._model is None or not under_process_group():
                return []
            wrapped = [module for module in self._model.modules() if _is_ddp(module)]
            self._found = [*wrapped, *fully_sharded(self._model)]
        return self._found

    @property
    def _sharded(self) -> list[Any]:
        return [module for module in self._modules if not _is_ddp(module)]

    def own_rule(self) -> str:
        """Return why the gradient is not the mean over the ranks at present, as one of them was given another rule; ""
        where none was. That may be done at any time."""
        for module in self._modules:
            if reduces_by_own_rule(module):
                return _OWN_RULE.format("DistributedDataParallel" if _is_ddp(module) else "fully_shard()ed model")
        return ""

    def gradients_there(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return this rank's part of the gradients that backward passes have left for these parameters: in ``.grad``,
        which the parts have also while fully_shard() has something else stand in their place, and what is not reduced
        yet. One may be among them several times."""
        own = list(parameters)
        found = [parameter.grad for parameter in own if parameter.grad is not None]
        for part, waiting in self._of_sharded(own):
            found += [*([] if part is None else [part]), *waiting]
        return [local_of(gradient) for gradient in found]

    def unreduced(self, parameters: Callable[[], Iterable[Tensor]]) -> bool:
        """Return whether gradients of these parameters wait to be reduced over all ranks of fully_shard(); they are
        asked for where there is such a module."""
        return bool(self._sharded) and any(waiting for _, waiting in self._of_sharded(parameters()))

    def _of_sharded(self, parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        own = {id(parameter) for parameter in parameters} if self._sharded else set()
        for module in self._sharded:
            for group in fsdp_groups(module):
                for places, part, waiting in gradients_of(group):
                    if places & own:
                        yield part, waiting


def _is_ddp(module: nn.Module) -> bool:
    return ddp_of(module) is not None
