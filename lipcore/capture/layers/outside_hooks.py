"""A module's forward once more with a graph that keeps its tensors itself, inside a checkpoint that would keep none."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lipcore.models.copies import why_not_again
from lipcore.models.pause import paused
from lipcore.models.restored import RandomPass, module_state_put_back, random_numbers_put_back
from lipcore.models.torch_internals import top_saved_tensors_hooks, without_saved_tensors_hooks


def run_outside_hooks(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Return what a module makes of a call, with nodes that may be run and read as often as anyone likes; None where no
    hooks are on what it keeps, or where it cannot be run once more without anyone noticing.

    A checkpoint, which runs the module again in the backward pass, counts what it has seen the first time: this is
    unknown to it.
    """
    if top_saved_tensors_hooks(True) is None or not torch.is_grad_enabled():
        return None
    inside = any(True for child in module.children() for _ in child.parameters())
    if inside or why_not_again(module, arguments, keywords):
        return None
    with (
        suppress(RandomPass),
        random_numbers_put_back(module),
        module_state_put_back(module),
        without_saved_tensors_hooks(),
        paused(),
    ):
        return module.forward(*arguments, **keywords)
    return None
