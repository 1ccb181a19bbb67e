"""Passes that all ranks of a sharded model run together, in which nobody speaks to other ranks but fully_shard()."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from lipcore.models.gathered import nothing_reduced
from lipcore.models.ranks import Communicates
from lipcore.models.tensor_parallel import part_ranks
from lipcore.models.torch_internals import TorchDispatchMode

_SHARDING = "torch.distributed.fsdp"


@contextmanager
def as_all_run(model: nn.Module) -> Iterator[None]:
    """Reduce no gradients in the with block, which all ranks of a sharded model run.

    Raises:
        Communicates: at its end, the model itself has spoken to other ranks. Not amid it, where they would be left
            waiting. Nothing is said of models that other ranks have parts of (tensor parallelism), which have to.
    """
    heard = _Heard()  # type: ignore[no-untyped-call]
    with nothing_reduced(model):
        if _is_in_parts(model):
            yield
            return
        with heard:
            yield
    if heard.spoke:
        raise Communicates("its pass communicates with other ranks")


def _is_in_parts(model: nn.Module) -> bool:
    try:
        return part_ranks(model, model.named_parameters()) is not None
    except ValueError:  # over several sets of ranks
        return True


class _Heard(TorchDispatchMode):
    spoke = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace and not _is_sharding():
            self.spoke = True
        return function(*args, **(kwargs or {}))


def _is_sharding() -> bool:
    """Return whether it is fully_shard() that calls an operation: it gathers parameters."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_SHARDING):
            return True
        frame = frame.f_back
    return False
