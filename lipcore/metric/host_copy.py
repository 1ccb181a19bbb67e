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
