"""Over which ranks the gradient is averaged in the backward pass, as wrappers of the model say it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lipcore.models.gathered import in_parts
from lipcore.models.ranks import rank, ranks_of, under_process_group
from lipcore.models.reduction import Reduction
from lipcore.models.tensor_parallel import averaging_ranks, part_ranks
from lipcore.models.torch_internals import ddp_of

UNKNOWN = (
    "there are other ranks, and the model is no DistributedDataParallel and not fully_shard()ed here, so that nobody "
    "knows whose samples are in its gradient; pass the wrapped module that your loop calls (a trainer's callback finds "
    "its DistributedDataParallel, and no other wrapper), or, where each rank trains a model of its own, "
    "group=None to the Monitor"
)
GONE = (
    "the DistributedDataParallel that lipcore was given is of a process group that is gone (destroy_process_group()): "
    "take monitor.state_dict(), close() the Monitor, and load the state into a new one of the model that runs now"
)
_MESHES = "its parameters lie on several device meshes, so that nobody knows whose mean their gradients are"


def is_of_a_gone_group(model: nn.Module | None) -> bool:
    """Return whether the model is in a DistributedDataParallel whose process group is gone, and another in its place:
    that wrapper's forward pass is called no more."""
    if not (under_process_group() and isinstance(model, nn.parallel.DistributedDataParallel)):
        return False
    return not ranks_of(model.process_group)


def _reduces_all(model: nn.Module) -> bool:
    """Return whether modules that torch's composable replicate() was called on, over the same ranks, reduce the
    gradients of all parameters that are trained."""
    wrappers = [wrapper for module in model.modules() if (wrapper := ddp_of(module)) is not None]
    reduced = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return len({ranks_of(one.process_group) for one in wrappers}) == 1 and reduced >= set(map(id, trained))


def averaged_over(model: nn.Module) -> tuple[tuple[int, ...], str]:
    """Return the ranks over which the gradient is the mean when a backward pass is over; () and the reason where that
    is not known."""
    reducing, ranks, why = _reduced_over(model)
    own_rule = Reduction(reducing).own_rule()
    return ((), own_rule) if own_rule else (ranks, why)


def _reduced_over(model: nn.Module) -> tuple[nn.Module | None, tuple[int, ...], str]:
    """Return what reduces the gradient, among which ranks, and why these are not known. A rule that it was given is
    said before that; None where it is not to be asked for one, since the reason says more."""
    for module in model.modules():
        wrapper = ddp_of(module)
        if wrapper is not None and (wrapper is module or _reduces_all(model)):
            ranks = ranks_of(wrapper.process_group)
            return module if wrapper is module else model, ranks, "" if ranks else GONE
    if part_ranks(model, model.named_parameters()) is not None:  # and others hold parts of the same gradient
        several = averaging_ranks(model)
        if len(several) > 1:
            return model, (), _MESHES
        return model, tuple(sorted(several[0])) if several else (rank(),), ""
    held = in_parts(model, ((name, "", parameter) for name, parameter in model.named_parameters()))
    meshes: list[Any] = list(dict.fromkeys(p.device_mesh for *_, p in held if hasattr(p, "device_mesh")))
    if len(meshes) != 1:
        return None, (), _MESHES if meshes else UNKNOWN
    return model, tuple(sorted(meshes[0].mesh.flatten().tolist())), ""
