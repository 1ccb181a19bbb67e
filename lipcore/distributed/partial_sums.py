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
        take: gets the sum, and this rank's addend, on the CPU.
    """

    number: Tensor
    handle: Any
    take: Callable[[Tensor, Tensor], None]


def add_up(partials: Sequence[Partial]) -> None:
    """Add up; one collective for each group of ranks, all of which call this with addends of the same shapes."""
    handles = {id(partial.handle): partial.handle for partial in partials}
    for key, handle in handles.items():
        mine = [partial for partial in partials if id(partial.handle) == key]
        device = mine[0].number.device  # one copy from there, and one back, however many they are
        own = torch.cat([partial.number.reshape(-1).to(device) for partial in mine])
        flat = own.clone().to(device_of(handle))
        torch.distributed.all_reduce(flat, group=handle)
        sizes = [partial.number.numel() for partial in mine]
        for partial, total, addend in zip(mine, flat.cpu().split(sizes), own.cpu().split(sizes), strict=True):
            shape = partial.number.shape
            partial.take(total.reshape(shape), addend.reshape(shape))
