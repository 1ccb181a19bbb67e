"""Parameters of fully_shard()ed modules that are gathered while a pass is under way, and no DTensors then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from lipcore.models.ranks import has_dtensors
from lipcore.models.torch_internals import fsdp_groups


def fully_sharded(model: nn.Module) -> list[Any]:
    """Return the fully_shard()ed modules in a model."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def is_spread(model: nn.Module) -> bool:
    """Return whether parameters are spread over ranks: DTensors, or gathered from such for the pass under way."""
    return has_dtensors(model) or bool(fully_sharded(model))


def gathers_by_part(model: nn.Module) -> bool:
    """Return whether parts of a model gather their parameters when they run, and not the model as a whole."""
    return any(module is not model for module in fully_sharded(model))


def is_there(tensor: Tensor) -> bool:
    """Return whether a gathered parameter has its memory: fully_shard() keeps the tensor, and lets go of that alone."""
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def mesh_of(model: nn.Module) -> Any:
    """Return the mesh that the first parameter of a model that is spread over ranks is on."""
    of_parameters = (p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
    of_groups = (group.mesh_info.mesh for module in fully_sharded(model) for group in fsdp_groups(module))
    return next(of_parameters, None) or next(of_groups)


def let_go(model: nn.Module) -> None:
    """Let fully_shard()ed modules hold their parts again: what they have gathered would be used by the next forward
    pass, whatever the optimizer has changed since. No collective."""
    for module in fully_sharded(model):
        module.reshard()


def nothing_reduced(model: nn.Module) -> AbstractContextManager[None]:
    """Keep fully_shard()ed modules from reducing, in a backward pass of lipcore's own, gradients that they have added
    up for the training's next reduce."""
    return _unset(model, "reduce_grads")


def kept_gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Keep what fully_shard()ed modules have gathered through a backward pass of lipcore's own: that would let go of
    it, and to gather it once more is a collective that the other ranks may not make."""
    return _unset(model, "reshard_after_backward")


@contextmanager
def _unset(model: nn.Module, setting: str) -> Iterator[None]:
    groups = [group for module in fully_sharded(model) for group in fsdp_groups(module)]
    before = [getattr(group, setting) for group in groups]
    for group in groups:
        setattr(group, setting, False)
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            setattr(group, setting, value)
