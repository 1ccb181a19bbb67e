"""Parameters of fully_shard()ed modules that are gathered while a forward pass is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lipcore.models.ranks import under_process_group


@contextmanager
def gathered_again(model: nn.Module) -> Iterator[None]:
    """Have the fully_shard()ed modules that held whole parameters before the with block hold them after it: a backward
    pass of lipcore's own in it lets go of them, and the user's forward pass goes on with them."""
    before = _whole(model) if under_process_group() else set()
    try:
        yield
    finally:
        if before:
            _gather(model, before)


def _whole(model: nn.Module) -> set[tuple[int, str]]:
    """Return where whole parameters are: the module, and the name in it."""
    return {
        (id(module), name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not hasattr(parameter, "placements")
    }


def _gather(model: nn.Module, before: set[tuple[int, str]]) -> None:
    gone = {module for module, _ in before - _whole(model)}
    if not gone:
        return
    from torch.distributed.fsdp import FSDPModule

    for sharder in model.modules():
        if isinstance(sharder, FSDPModule) and any(id(module) in gone for module in sharder.modules()):
            sharder.unshard()
