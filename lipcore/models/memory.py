"""How much memory is free where a tensor lies."""

from __future__ import annotations

from pathlib import Path

import torch

_LINUX = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes may still be allocated there without anything being moved; None where it is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type != "cpu" or not _LINUX.exists():
        return None
    for line in _LINUX.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
