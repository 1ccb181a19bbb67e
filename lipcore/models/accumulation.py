"""Backward passes inside a model's forward pass (losses of single layers, steps of an inner training): where lipcore
runs the model of its own accord, these would add to the gradients of the training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lipcore.models.outputs import gradient_node


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
    not one of another thread, which trains the model meanwhile. Gradients that the model takes away (`zero_grad()`) are
    there again afterwards."""
    mine = threading.get_ident()

    def refuse(_: Any) -> None:
        # A device's backward passes run in threads of torch's own, which Python does not list.
        if all(thread.ident == mine or thread.ident != threading.get_ident() for thread in threading.enumerate()):
            raise Accumulates

    with torch.enable_grad():
        leaves = [gradient_node(p) for p in model.parameters() if p.requires_grad and p.is_leaf]
    handles = [node.register_prehook(refuse) for node in leaves]
    before = [(p, p.grad) for p in model.parameters()]
    alone = threading.active_count() == 1
    for parameter, _ in before if alone else ():
        parameter.grad = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in before:
            # Where other threads run, one may train the model: what was there is put back, what has come may be its.
            if parameter.grad is not grad and (alone or grad is not None):
                parameter.grad = grad
