"""Numbers of all ranks together, of which some are added up, and of others the largest is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipcore.distributed.group import Group


@dataclass
class Packed:
    """What one rank adds to a merged window: float64 tensors on the CPU, of the same shapes on all ranks.

    Attributes:
        sums: to be added up; or a function that makes them of the maxima over all ranks, which may say their shapes.
        largest: of which the maxima are wanted.
    """

    sums: list[Tensor] | Callable[[list[Tensor]], list[Tensor]]
    largest: list[Tensor]


@dataclass
class Together:
    """What :class:`Packed` of all ranks comes to."""

    sums: list[Tensor]
    largest: list[Tensor]


def folded(parts: Callable[[], Iterable[Packed]]) -> Together:
    """Return what the parts of so many ranks come to, without ranks: one part after the other, so that
    memory does not grow with their number.

    Args:
        parts: gives them, alike; called twice where sums are made of maxima.
    """
    largest: list[Tensor] | None = None
    sums: list[Tensor] | None = None
    later = False  # some of the sums are made of the maxima
    for part in parts():
        largest = _with(largest, part.largest, torch.maximum)
        later |= callable(part.sums)
        if not callable(part.sums):
            sums = _with(sums, part.sums, torch.add)
    for part in parts() if later else ():
        sums = _with(sums, part.sums(largest or []) if callable(part.sums) else [], torch.add)
    return Together(sums or [], largest or [])


def _with(so_far: list[Tensor] | None, more: Sequence[Tensor], operation: Callable[..., Tensor]) -> list[Tensor]:
    if so_far is None:
        return [tensor.clone() for tensor in more]
    for into, tensor in zip(so_far, more, strict=True):
        operation(into, tensor, out=into)
    return so_far


def room_for(text: str) -> int:
    """Return bytes for :meth:`gathered` that are the same for texts of about the same length."""
    return 1 << len(text.encode()).bit_length()


def gathered(text: str, room: int, group: Group) -> list[str]:
    """Return the texts of all ranks, "" for one that is longer than `room` bytes. One collective."""
    data = torch.zeros(8 + room, dtype=torch.uint8, device="cpu")
    encoded = text.encode()
    if len(encoded) > room:
        encoded = b""  # nothing is raised that others do not raise too
    written = len(encoded).to_bytes(8, "little") + encoded
    data[: len(written)] = torch.from_numpy(np.frombuffer(written, dtype=np.uint8).copy())
    data = data.to(group.device)
    all_of_them = [torch.empty_like(data) for _ in range(group.size)]
    torch.distributed.all_gather(all_of_them, data, group=group.handle)
    found = []
    for each in all_of_them:
        raw = each.cpu().numpy().tobytes()
        found.append(raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode())
    return found
