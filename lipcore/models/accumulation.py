"""Backward passes inside a model's forward pass (losses of single layers, steps of an inner training): where lipcore
runs the model of its own accord, these would add to the gradients of the training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


class Accumulates(RuntimeError):
    """The error of such a backward pass, before it has added anything."""

    def __init__(self) -> None:
        super().__init__(
            "its forward pass calls backward() itself, which would add to the gradients of the training; call "
            "torch.autograd.grad(), or backward() outside of forward()"
        )


@contextmanager
def without_accumulation(model: nn.Module) -> Iterator[None]:
    """Have a backward pass raise :class:`Accumulates` in this with block where it comes to a parameter of the model;
    not one of another thread, which trains the model meanwhile."""
    mine = threading.get_ident()

    def refuse(_: Any) -> None:
        # A device's backward passes run in threads of torch's own, which Python does not list.
        if all(thread.ident == mine or thread.ident != threading.get_ident() for thread in threading.enumerate()):
            raise Accumulates

    with torch.enable_grad():
        leaves = [get_gradient_edge(p).node for p in model.parameters() if p.requires_grad and p.is_leaf]
    handles = [node.register_prehook(refuse) for node in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
