"""Batches of one: the per-sample gradient is the gradient, so no layer need be tapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.capture.parameters import GradientWatch

_float64 = torch.float64


def served_by_gradients(parameters: list[nn.Parameter]) -> bool:
    """Whether what a backward pass leaves in .grad will be the gradient of one sample, and still be there."""
    for parameter in parameters:
        if parameter.grad is not None or parameter._backward_hooks or not parameter.is_cpu:
            return False
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks and not all(GradientWatch.is_ours(hook) for hook in hooks.values()):
            return False  # an optimizer inside the backward pass takes the gradient away
        if parameter.dtype not in (torch.float32, _float64):
            return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def gradient_squares(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Per parameter that has a gradient, float64 [1]: its sum of squares."""
    names, gradients = [], []
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        gradient = gradient.detach()
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        names.append(name)
        gradients.append(gradient if torch.ops.aten.is_non_overlapping_and_dense(gradient) else gradient.contiguous())
    rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=_float64)
    if gradients:
        _core.square_sums(gradients, rows)
    return dict(zip(names, rows[:, :1].unbind(), strict=True))


def on_backward(output: Any, hook: Callable[[], None]) -> bool:
    """Call the hook when the backward pass enters the graph behind the output; False when there is no one place."""
    node = output.grad_fn if isinstance(output, Tensor) else None
    if node is None:
        return False
    node.register_prehook(lambda _: hook())
    return True
