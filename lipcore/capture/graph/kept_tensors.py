"""Hooks under which a checkpoint keeps nothing of its own accord, but lipcore what it reads and runs again.

A node inside a checkpoint may be run, and what it has kept be read, once only, and by the engine. So tensors are kept
beside what the checkpoint makes of them: the engine is given the checkpoint's, which the training is then as before,
and whoever asks within :func:`reading` is given lipcore's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lipcore.models.torch_internals import keeps_by_hooks, top_saved_tensors_hooks


class _Reading(threading.local):
    now = False
    all_kept = False


_reading = _Reading()


@contextmanager
def reading(kept: KeptTensors | None = None) -> Iterator[None]:
    """Give what nodes have kept to lipcore, not to the engine, within the with block; `kept`: by the pass that is
    looked at."""
    before = _reading.now, _reading.all_kept
    _reading.now, _reading.all_kept = True, kept is not None and not kept.full
    try:
        yield
    finally:
        _reading.now, _reading.all_kept = before


def under_hooks() -> bool:
    """Return whether what graphs keep goes through hooks now."""
    return top_saved_tensors_hooks(True) is not None


class KeptTensors:
    """The tensors that one pass keeps beside a checkpoint's.

    Args:
        max_bytes: what they may take; once they take more, none are kept.
        others: addresses of storages that are there anyway.
    """

    def __init__(self, max_bytes: int, others: Collection[int]) -> None:
        self._max_bytes = max_bytes
        self._storages = set(others)
        self._bytes = 0

    @property
    def full(self) -> bool:
        """True where they take more than they may."""
        return self._bytes > self._max_bytes

    def hooks(self) -> saved_tensors_hooks | None:
        """Return hooks in front of those that are on, which need not be asked for long; None where none are on, or
        these already."""
        top = top_saved_tensors_hooks(True)
        if top is None or top[1] is _unpacked or self.full:
            return None
        pack, unpack = top

        def keep(tensor: Tensor) -> _Kept:
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._storages:
                    self._storages.add(storage.data_ptr())
                    self._bytes += storage.nbytes()
            return _Kept(None if self.full else tensor.detach(), pack(tensor), unpack)

        return saved_tensors_hooks(keep, _unpacked)


class _Kept:
    """A tensor beside what other hooks have made of it."""

    def __init__(self, tensor: Tensor | None, packed: Any, unpack: Callable[[Any], Tensor]) -> None:
        self.tensor, self.packed, self.unpack = tensor, packed, unpack


def _unpacked(kept: _Kept) -> Tensor:
    return kept.tensor if _reading.now and kept.tensor is not None else kept.unpack(kept.packed)


def is_once_only(node: Any) -> bool:
    """Return whether what a node has kept may be read once only, since hooks other than these are on it, or these have
    not kept everything."""
    return keeps_by_hooks(node, but=_unpacked if _reading.all_kept else None)
