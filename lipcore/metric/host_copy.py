"""Copies of a device's tensors on the host, for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors of one CUDA device in pinned memory, there when what the device was doing then is done."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu").copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        # Of the tensors' device, where the copies are queued; another one may be current.
        self._event = torch.cuda.current_stream(tensors[0].device).record_event()

    @property
    def is_there(self) -> bool:
        """True when the tensors can be read without waiting."""
        return bool(self._event.query())

    def tensors(self) -> list[Tensor]:
        """Return the copies; waits until they are there."""
        self._event.synchronize()
        return self._copies
