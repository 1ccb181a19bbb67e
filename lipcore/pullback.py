"""The linear map of a first layer and its transpose: what turns dL/du into dL/dx without another backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.grad
from torch import Tensor, nn

_CONV_INPUT: dict[type, Any] = {
    nn.Conv1d: torch.nn.grad.conv1d_input,
    nn.Conv2d: torch.nn.grad.conv2d_input,
    nn.Conv3d: torch.nn.grad.conv3d_input,
}


def pull_back(module: nn.Module, weight: Tensor, delta: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    """W_1^T delta for a batch: the gradient with respect to the layer's input, of shape `input_shape`."""
    if isinstance(module, nn.Linear):
        return delta @ weight
    if isinstance(module, tuple(_CONV_INPUT)):
        if module.padding_mode == "zeros" and not isinstance(module.padding, str):
            transpose = next(f for kind, f in _CONV_INPUT.items() if isinstance(module, kind))
            result: Tensor = transpose(
                input_shape, weight, delta, module.stride, module.padding, module.dilation, module.groups
            )
            return result
        # Padding by name or by the input's own values: the layer is linear, so its derivative anywhere will do.
        with torch.enable_grad():
            x = torch.zeros(input_shape, dtype=delta.dtype, device=delta.device, requires_grad=True)
            return torch.autograd.grad(module._conv_forward(x, weight, None), x, delta)[0]  # type: ignore[operator]
    raise TypeError(f"no linear map for {type(module).__name__}")


def push_forward(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """W_1 x for a batch, without the bias."""
    if isinstance(module, nn.Linear):
        return x @ weight.T
    if isinstance(module, tuple(_CONV_INPUT)):
        result: Tensor = module._conv_forward(x, weight, None)  # type: ignore[operator]
        return result
    raise TypeError(f"no linear map for {type(module).__name__}")
