"""DTensors in the user's model: this rank's values of one, and a tensor that lies on the ranks as one does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lipcore.models.torch_internals import shard_of


def local_of(tensor: Any) -> Tensor:
    """Return this rank's values of a DTensor, and of what a collective still brings, when it has come; any other tensor
    as it is."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return tensor
    tensor = getattr(tensor, "_local_tensor", tensor)
    wait = getattr(tensor, "trigger_wait", None)  # of an AsyncCollectiveTensor, whose memory is read here
    return tensor if wait is None else wait()  # type: ignore[no-any-return]


def await_values(tensors: Iterable[Tensor]) -> None:
    """Wait for what collectives still bring of these tensors: then all ranks have come so far."""
    for tensor in tensors:
        local_of(tensor)


def is_partial(tensor: Tensor) -> bool:
    """Return whether a DTensor is a sum of what ranks have, so that none of them knows its values."""
    return any(placement.is_partial() for placement in getattr(tensor, "placements", ()))


def is_in_parts(tensor: Tensor) -> bool:
    """Return whether ranks hold parts of a DTensor."""
    return any(getattr(placement, "dim", None) is not None for placement in getattr(tensor, "placements", ()))


def is_one_block(tensor: Any) -> bool:
    """Return whether this rank's part of a DTensor is one block of it: of packed parameters each rank may have a piece
    of each (`_StridedShard`)."""
    return all(placement.is_shard() for placement in tensor.placements if getattr(placement, "dim", None) is not None)


def placed_as(whole: Tensor, other: Any) -> Tensor:
    """Return a tensor as a DTensor that lies on the ranks as another one of its shape; itself where that is none. No
    collective: every rank has the whole."""
    if not hasattr(other, "placements"):
        return whole
    from torch.distributed.tensor import DTensor

    shape, offset = shard_of(other)
    local = whole[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))].contiguous()
    local = local.to(local_of(other).device)
    return DTensor.from_local(
        *(local, other.device_mesh, other.placements), run_check=False, shape=whole.shape, stride=whole.stride()
    )
