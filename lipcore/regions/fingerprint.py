"""Whether a model still is what it was."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> dict[str, bytes]:
    """A hash of every parameter and buffer. Values, not version counters: fused optimizers do not raise those."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: _hash(tensor.detach()) for name, tensor in tensors}


def _hash(tensor: Tensor) -> bytes:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    raw = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).digest()


def changed(before: dict[str, bytes], model: nn.Module) -> list[str]:
    """Names of what is new, gone or has other values."""
    after = fingerprint(model)
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
