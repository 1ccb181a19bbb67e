"""Does the output depend on the input past the first layer? Watched during one forward pass, without changing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class BypassWatch(TorchDispatchMode):
    """Follows the storages that hold the input, or floating values made of it, up to the first layer's output and after
    it.

    An input skip (x added or concatenated behind the first layer) makes grad_x f more than W_1^T grad_u f. Operators
    run as they would without it; only which storage goes where is noted.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of_input = {_storage(leaf) for leaf in tree_leaves(inputs) if _carries_gradient(leaf)}
        self._past_first: set[StorageWeakRef] = set()
        self._reached = False

    def first_layer_done(self, output: Tensor) -> None:
        """From here on, whatever still uses the input goes past the first layer."""
        self._reached = True
        self._of_input.discard(_storage(output))

    def bypasses(self, output: Tensor) -> bool:
        """Whether this output depends on the input past the first layer."""
        return self._reached and _storage(output) in self._past_first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _carries_gradient(leaf)]
        past = any(s in self._past_first for s in storages)
        of_input = any(s in self._of_input for s in storages)
        if past or of_input:
            made = {_storage(leaf) for leaf in tree_leaves(result) if _carries_gradient(leaf)}
            (self._past_first if past or self._reached else self._of_input).update(made)
        return result


def _carries_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _storage(tensor: Tensor) -> StorageWeakRef:
    # A weak reference keeps the address from being reused while we remember it, but not the memory from being freed.
    return StorageWeakRef(tensor.untyped_storage())


def watchable(arguments: Any) -> bool:
    """Whether this forward pass can be watched: eager, with a plain floating input."""
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    plain = all(type(leaf) is Tensor and leaf.layout == torch.strided for leaf in leaves)
    return plain and any(_carries_gradient(leaf) for leaf in leaves)
