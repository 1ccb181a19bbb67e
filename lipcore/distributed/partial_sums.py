"""Numbers that several ranks hold addends of, added up among these ranks alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.group import device_of


@dataclass
class Partial:
    """An addend.

    Attributes:
        number: this rank's, float64.
        handle: the process group of the ranks that have the others, what collectives take as `group`.
        take: gets the sum, on the CPU.
    """

    number: Tensor
    handle: Any
    take: Callable[[Tensor], None]


def add_up(partials: Sequence[Partial]) -> None:
    """Add up; one collective for each group of ranks, all of which call this with addends of the same shapes."""
    handles = {id(partial.handle): partial.handle for partial in partials}
    for key, handle in handles.items():
        mine = [partial for partial in partials if id(partial.handle) == key]
        flat = torch.cat([partial.number.reshape(-1).cpu() for partial in mine]).to(device_of(handle))
        torch.distributed.all_reduce(flat, group=handle)
        pieces = flat.cpu().split([partial.number.numel() for partial in mine])
        for partial, piece in zip(mine, pieces, strict=True):
            partial.take(piece.reshape(partial.number.shape))
