"""Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipcore.layers.factor import Factor
from lipcore.layers.factors import ChannelSum, Patches
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule, argument


class _ConvolutionRule(Rule):
    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = argument(arguments, keywords, 0, "input")
        batch.check_first(x, len(module.kernel_size) + 2)  # type: ignore[arg-type]
        return (x,), None

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        found = {"weight": self.patches(module, grad_output, saved[0])}
        if module.bias is not None:
            found["bias"] = ChannelSum(grad_output)
        return found

    def patches(self, module: Any, grad: Tensor, x: Tensor) -> Factor:
        raise NotImplementedError


class ConvRule(_ConvolutionRule):
    """Padding that is not zeros, or not the same on both sides, is put around the input first, as torch does."""

    def patches(self, module: Any, grad: Tensor, x: Tensor) -> Factor:
        padding: Any = module.padding
        sides = list(module._reversed_padding_repeated_twice)  # last dimension first: left, right
        if module.padding_mode != "zeros":
            x = torch.nn.functional.pad(x, sides, mode=module.padding_mode)
            padding = [0] * len(module.kernel_size)
        elif isinstance(padding, str):
            if sides[::2] == sides[1::2]:
                padding = sides[::-2]
            else:
                x = torch.nn.functional.pad(x, sides)
                padding = [0] * len(module.kernel_size)
        return Patches(
            x,
            grad,
            module.weight.shape,
            kernel_size=list(module.kernel_size),
            stride=list(module.stride),
            padding=list(padding),
            dilation=list(module.dilation),
            groups=module.groups,
        )


class ConvTransposeRule(_ConvolutionRule):
    """The transpose of a convolution: input and gradient change roles."""

    def patches(self, module: Any, grad: Tensor, x: Tensor) -> Factor:
        return Patches(
            grad,
            x,
            module.weight.shape,
            kernel_size=list(module.kernel_size),
            stride=list(module.stride),
            padding=list(module.padding),
            dilation=list(module.dilation),
            groups=module.groups,
        )


for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_conv, ConvRule())
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_transposed, ConvTransposeRule())
