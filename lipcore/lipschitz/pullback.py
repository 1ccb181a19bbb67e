"""The linear map of a first layer and its transpose: what turns dL/du into dL/dx without another backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.grad
from torch import Tensor, nn

from lipcore.functional.ordered_sums import add_by_index

_CONV_INPUT: dict[type, Any] = {
    nn.Conv1d: torch.nn.grad.conv1d_input,
    nn.Conv2d: torch.nn.grad.conv2d_input,
    nn.Conv3d: torch.nn.grad.conv3d_input,
}


def pull_back(module: nn.Module, weight: Tensor, delta: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    """Compute W_1^T delta for a batch: the gradient with respect to the layer's input, which has `input_shape` but for
    the batch."""
    if isinstance(module, nn.Linear):
        return delta @ weight
    input_shape = (delta.shape[0], *input_shape[1:])
    if isinstance(module, tuple(_CONV_INPUT)):
        transpose = next(f for kind, f in _CONV_INPUT.items() if isinstance(module, kind))
        if module.padding_mode == "zeros" and not isinstance(module.padding, str):
            result: Tensor = transpose(
                input_shape, weight, delta, module.stride, module.padding, module.dilation, module.groups
            )
            return result
        # Padding by name or by the input's own values: of the padded input first.
        # Left and right, the last dimension first.
        sides: list[int] = module._reversed_padding_repeated_twice  # type: ignore[assignment]
        padded = list(input_shape)
        for i in range(len(sides) // 2):
            padded[-1 - i] += sides[2 * i] + sides[2 * i + 1]
        result = transpose(tuple(padded), weight, delta, module.stride, 0, module.dilation, module.groups)
        for i in range(len(sides) // 2):
            left, right = sides[2 * i], sides[2 * i + 1]
            result = _unpadded(result, -1 - i, input_shape[-1 - i], left, right, str(module.padding_mode))
        return result
    raise TypeError(f"no linear map for {type(module).__name__}")


def _unpadded(grad: Tensor, dim: int, size: int, left: int, right: int, mode: str) -> Tensor:
    """Return the transpose of padding one dimension of this size: every padded element's gradient goes where it came
    from."""
    if mode == "zeros":
        return grad.narrow(dim, left, size)
    places = torch.arange(size, dtype=torch.float64, device=grad.device)[None, None]
    source = nn.functional.pad(places, (left, right), mode=mode)[0, 0].long()
    shape = list(grad.shape)
    shape[dim] = size
    out = grad.new_zeros(shape)
    add_by_index(out.movedim(dim, 0), grad.movedim(dim, 0), source)
    return out


def push_forward(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Compute W_1 x for a batch, without the bias."""
    if isinstance(module, nn.Linear):
        return x @ weight.T
    if isinstance(module, tuple(_CONV_INPUT)):
        result: Tensor = module._conv_forward(x, weight, None)  # type: ignore[operator]
        return result
    raise TypeError(f"no linear map for {type(module).__name__}")
