"""Does the output depend on the input past the first layer? Watched during one forward pass, without changing it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lipcore.capture.taps.tap import Tap
from lipcore.models.torch_internals import TorchDispatchMode, tree_leaves


def watch_input(arguments: Any) -> BypassWatch | None:
    """Begin to follow the input through a forward pass; None where it cannot be: not eager, or no plain floating
    input."""
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    plain = all(type(leaf) is Tensor and leaf.layout == torch.strided for leaf in leaves)
    if not plain or not any(_carries_gradient(leaf) for leaf in leaves):
        return None
    watch = BypassWatch(arguments)
    watch.__enter__()  # type: ignore[no-untyped-call]
    return watch


class BypassWatch(TorchDispatchMode):
    """Follows the storages that hold the input, or floating values made of it, up to the first layer's output and after
    it.

    An input skip (x added or concatenated behind the first layer) makes grad_x f more than W_1^T grad_u f. Operators
    run as they would without it; only which storage goes where is noted.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of_input = _storages(inputs)
        self._past_first: set[StorageWeakRef] = set()
        self._followers: list[Tap] = []  # on the first layer, once it has run

    def reached(self, taps: Iterable[Tap], output: Tensor) -> None:
        """A tapped module has run; tells those on the first layer when a later output bypasses them."""
        followers = [tap for tap in taps if tap.follows_input]
        if followers:  # from here on, whatever still uses the input goes past the first layer
            self._of_input -= _storages(output)
            self._followers += followers
        elif self._followers and not self._past_first.isdisjoint(_storages(output)):
            for tap in self._followers:
                tap.bypassed()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = _storages((args, kwargs))
        past = not self._past_first.isdisjoint(storages)
        of_input = not self._of_input.isdisjoint(storages)
        if past or of_input:
            made = _storages(result)
            (self._past_first if past or self._followers else self._of_input).update(made)
        return result


def _carries_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _storages(values: Any) -> set[StorageWeakRef]:
    """The memory of every floating tensor among them that has memory of its own (a sparse one has not)."""
    dense = (leaf for leaf in tree_leaves(values) if _carries_gradient(leaf) and leaf.layout == torch.strided)
    # A weak reference keeps the address from being reused while we remember it, but not the memory from being freed.
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in dense}
