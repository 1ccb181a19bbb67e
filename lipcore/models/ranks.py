"""Whether other processes train the same model, asked in one way everywhere."""

from __future__ import annotations

import torch


def under_process_group() -> bool:
    """Return whether torch.distributed has a process group, be it of one rank."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return torch.distributed.get_world_size() if under_process_group() else 1
