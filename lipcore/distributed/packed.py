"""Numbers of all ranks together: everything that is added up in one all-reduce, all maxima in a second one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcore.distributed.group import Group


@dataclass
class Packed:
    """What one rank adds to a merged window: float64 tensors on the CPU, of the same shapes on all ranks."""

    sums: list[Tensor]
    largest: list[Tensor]


def reduced(parts: Sequence[Packed], group: Group) -> list[Packed]:
    """Return the parts of all ranks together. Two collectives, or one where no maxima are asked for."""
    sums = _all_reduced([t for part in parts for t in part.sums], group, torch.distributed.ReduceOp.SUM)
    largest = _all_reduced([t for part in parts for t in part.largest], group, torch.distributed.ReduceOp.MAX)
    found = []
    for part in parts:
        found.append(Packed(sums[: len(part.sums)], largest[: len(part.largest)]))
        sums, largest = sums[len(part.sums) :], largest[len(part.largest) :]
    return found


def _all_reduced(tensors: list[Tensor], group: Group, operation: torch.distributed.ReduceOp.RedOpType) -> list[Tensor]:
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(group.device)
    torch.distributed.all_reduce(flat, operation, group=group.handle)
    pieces = flat.cpu().split([tensor.numel() for tensor in tensors])
    return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def room_for(text: str) -> int:
    """Return bytes for :meth:`gathered` that are the same for texts of about the same length."""
    return 1 << len(text.encode()).bit_length()


def gathered(text: str, room: int, group: Group) -> list[str]:
    """Return the texts of all ranks, none of them longer than `room` bytes. One collective."""
    data = torch.zeros(8 + room, dtype=torch.uint8, device="cpu")
    encoded = text.encode()
    data[:8] = torch.tensor(list(len(encoded).to_bytes(8, "little")), dtype=torch.uint8)
    data[8 : 8 + len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    data = data.to(group.device)
    all_of_them = [torch.empty_like(data) for _ in range(group.size)]
    torch.distributed.all_gather(all_of_them, data, group=group.handle)
    found = []
    for each in all_of_them:
        raw = each.cpu().numpy().tobytes()
        found.append(raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode())
    return found
