"""Parameters of fully_shard()ed modules that are gathered while a pass is under way, and no DTensors then."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from lipcore.models.ranks import has_dtensors, is_sharded
from lipcore.models.torch_internals import (
    backward_begun,
    before_backward,
    forget_backward,
    fsdp_groups,
    parts_of_gathered,
    was_gathered,
)


def fully_sharded(model: nn.Module) -> list[Any]:
    """Return the fully_shard()ed modules in a model."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def is_spread(model: nn.Module) -> bool:
    """Return whether parameters are spread over ranks: DTensors, or gathered from such for the pass under way."""
    return has_dtensors(model) or bool(fully_sharded(model))


def holds_parts(model: nn.Module) -> bool:
    """Return whether a rank holds parts of some parameters only, which may be gathered just now."""
    return is_sharded(model) or bool(fully_sharded(model))


def gathers_by_part(model: nn.Module) -> bool:
    """Return whether parts of a model gather their parameters when they run, and not the model as a whole."""
    return any(module is not model for module in fully_sharded(model))


def is_there(tensor: Tensor) -> bool:
    """Return whether a gathered parameter has its memory: fully_shard() keeps the tensor, and lets go of that alone."""
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def in_parts(model: nn.Module, held: Iterable[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """Return (name, group, tensor) of parameters with what this rank holds of each between two steps: within one, what
    fully_shard() has gathered stands in its place, whole on every rank."""
    parts = _parts(model)
    return [(name, group, parts.get(id(tensor), tensor)) for name, group, tensor in held]


def part_of(model: nn.Module | None, tensor: Any) -> Any:
    """Return what this rank holds of one parameter between two steps, as :func:`in_parts` does."""
    return tensor if model is None or tensor is None else _parts(model).get(id(tensor), tensor)


@contextmanager
def between_steps(model: Any) -> Iterator[None]:
    """Have a model's parameters stand in the with block as they do between two steps: within one, behind a forward pass
    without a backward pass, or behind unshard(), what fully_shard() has gathered stands in the place of the parts.
    No collective; what is gathered stays so, and stands there again afterwards."""
    parts = _parts(model) if isinstance(model, nn.Module) else {}
    places = [
        (module._parameters, key, parameter)
        for module in (model.modules() if parts else ())
        for key, parameter in module._parameters.items()
        if id(parameter) in parts
    ]
    for owner, key, gathered in places:
        owner[key] = parts[id(gathered)]
    try:
        yield
    finally:
        for owner, key, gathered in places:
            if owner.get(key) is parts[id(gathered)]:
                owner[key] = gathered


def _parts(model: nn.Module) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for module in fully_sharded(model):
        found |= parts_of_gathered(module)
    return found


def mesh_of(model: nn.Module) -> Any:
    """Return the mesh that parameters of a model that is spread over ranks are on; of several the largest, which in a
    model that is cut and sharded has the ranks of both."""
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    meshes += [group.mesh_info.mesh for module in fully_sharded(model) for group in fsdp_groups(module)]
    return max(meshes, key=lambda mesh: mesh.size())


def let_go(model: nn.Module) -> None:
    """Let fully_shard()ed modules hold their parts again: what they have gathered would be used by the next forward
    pass, whatever the optimizer has changed since. No collective."""
    for module in fully_sharded(model):
        module.reshard()


def nothing_reduced(model: nn.Module) -> AbstractContextManager[None]:
    """Keep fully_shard()ed modules from reducing, in a backward pass of lipcore's own behind a forward pass that has
    ended, gradients that they have added up for the training's next reduce. Modules that have never run have none, and
    raise where they are not to reduce."""
    return _own_backward(model, "reduce_grads", [group for group in _groups(model) if was_gathered(group)])


def kept_gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Keep what fully_shard()ed modules have gathered through a backward pass of lipcore's own: that would let go of
    it, and to gather it once more is a collective that the other ranks may not make."""
    return _own_backward(model, "reshard_after_backward", _groups(model))


def _groups(model: nn.Module) -> list[Any]:
    return [group for module in fully_sharded(model) for group in fsdp_groups(module)]


@contextmanager
def _own_backward(model: nn.Module, setting: str, groups: Sequence[Any]) -> Iterator[None]:
    """Unset a setting for a backward pass of lipcore's own. Where that breaks off, modules go on as if it had not been:
    else the training's next one would end without what they do at its end, and gradients would be missing."""
    before = [getattr(group, setting) for group in groups]
    standing = [(module, before_backward(module)) for module in fully_sharded(model) if not backward_begun(module)]
    for group in groups:
        setattr(group, setting, False)
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            setattr(group, setting, value)
        broken_off = any(backward_begun(module) for module, _ in standing)
        for module, where in standing if broken_off else ():
            forget_backward(module, where)
