"""Copies of a device's tensors on the host, for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors of one CUDA device in pinned memory, there when what the device was doing then is done."""

    def __init__(self, *tensors: Tensor) -> None:
        # Of the tensors' device, where the copies are queued; another one may be current.
        stream = torch.cuda.current_stream(tensors[0].device)
        for tensor in tensors:
            tensor.record_stream(stream)  # it may be freed before it was read, and belong to another stream
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu").copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        self._event = stream.record_event()

    @property
    def is_there(self) -> bool:
        """True when the tensors can be read without waiting."""
        return bool(self._event.query())

    def tensors(self) -> list[Tensor]:
        """Return the copies; waits until they are there."""
        self._event.synchronize()
        return self._copies


def as_bits(numbers: Tensor) -> Tensor:
    """Return numbers as int64, those of floating-point ones by the bits of float64, so that all go in one copy."""
    return numbers.double().view(torch.int64) if numbers.is_floating_point() else numbers.long()


def of_bits(bits: Tensor, numbers: Tensor) -> Tensor:
    """Return from what :func:`as_bits` has made of numbers what they are: float64 or int64."""
    return bits.view(torch.float64) if numbers.is_floating_point() else bits
