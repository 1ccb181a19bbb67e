"""Whether other processes train the same model, asked in one way everywhere, and passes that these take no part in."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lipcore.models.torch_internals import TorchDispatchMode


def under_process_group() -> bool:
    """Return whether torch.distributed has a process group, be it of one rank."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return torch.distributed.get_world_size() if under_process_group() else 1


def rank() -> int:
    """Return the number of this process among the ranks, 0 without a process group."""
    return torch.distributed.get_rank() if under_process_group() else 0


def ranks_of(handle: Any) -> tuple[int, ...]:
    """Return the global numbers of a process group's members; () where the group is gone."""
    try:
        return tuple(torch.distributed.get_process_group_ranks(handle))
    except (KeyError, ValueError, RuntimeError):  # as torch's versions say of one that it does not know any more
        return ()


def has_dtensors(model: nn.Module) -> bool:
    """Return whether parameters are DTensors, cut or not."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Return whether a rank holds parts of some parameters only: DTensors that are cut, or FSDP1's pieces."""
    if is_fsdp1(model):
        return True
    placements = (getattr(p, "placements", ()) for p in model.parameters())
    return any(not placement.is_replicate() for each in placements for placement in each)


def is_fsdp1(model: nn.Module) -> bool:
    """Return whether FullyShardedDataParallel is in it, whose parameters are pieces of flat ones and do not say of
    what."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return fsdp is not None and any(isinstance(module, fsdp) for module in model.modules())


def below_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, which would take any pass for one of the training; others as
    they are."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


#: Why numbers of single samples cannot be told where a pass speaks to other ranks.
EXCHANGES = (
    "model: its pass exchanges activations with other ranks (tensor, sequence, context or expert parallelism), so that "
    "the gradient of a sample lies on several of them, and this rank would measure parts; if it only adds up numbers "
    "over the ranks (statistics, counts), which cannot be told apart, do that outside of forward()"
)


class Communicates(RuntimeError):
    """The error that says that other ranks would have been spoken to."""


def without_communication() -> AbstractContextManager[Any]:
    """Raise :class:`Communicates` where other ranks are spoken to: whether a pass of our own is run need not be the
    same on all of them."""
    return _Silence() if under_process_group() else nullcontext()  # type: ignore[no-untyped-call]


class _Silence(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            raise Communicates("its forward pass communicates with other ranks")
        return function(*args, **(kwargs or {}))
