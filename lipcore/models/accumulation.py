"""Backward passes inside a model's forward pass (losses of single layers, steps of an inner training): where lipcore
runs the model of its own accord, these would add to the gradients of the training."""

from __future__ import annotations

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
    """Have a backward pass raise :class:`Accumulates` in this with block where it comes to a parameter of the model."""
    with torch.enable_grad():
        leaves = [get_gradient_edge(p).node for p in model.parameters() if p.requires_grad and p.is_leaf]
    handles = [node.register_prehook(_refuse) for node in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse(_: Any) -> None:
    raise Accumulates
