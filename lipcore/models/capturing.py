"""Tells whether a CUDA graph is being captured."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing(tensor: Tensor) -> bool:
    """Return whether what is done with this tensor now is captured into a CUDA graph, and done by each of its replays,
    of which the host knows nothing."""
    if not tensor.is_cuda:
        return False
    if tensor.get_device() == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()


def is_captured_here() -> bool:
    """Return whether what is done now on the current device is captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
