"""Fingerprints of a model, to tell whether it still is what it was."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lipcore.models.chains import altered_modules

_SETTINGS = ""  # no parameter is called so


def fingerprint(model: nn.Module) -> dict[str, bytes]:
    """Hash every parameter and buffer, and the modules with their settings and other parties' hooks. Values are
    hashed and not version counters, which fused optimizers do not raise."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    hooks = {where: [id(hook) for hook in found] for where, found in altered_modules(model).items()}
    settings = hashlib.blake2b(f"{model!r} {hooks}".encode(), digest_size=16).digest()
    return {name: _hash(tensor.detach()) for name, tensor in tensors} | {_SETTINGS: settings}


def _hash(tensor: Tensor) -> bytes:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    raw = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).digest()


def changed(before: dict[str, bytes], model: nn.Module) -> str:
    """Say in words what is new, gone or has other values; "" where nothing is."""
    after = fingerprint(model)
    names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    found = ["its modules, their settings or their hooks"] if _SETTINGS in names else []
    tensors = sorted(name for name in names if name != _SETTINGS)
    if tensors:
        found.append(f"{len(tensors)} parameters or buffers, '{tensors[0]}' among them")
    return "; ".join(found)
