"""Transposed convolutions: convolutions with input and output in each other's place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.calls import as_autocast, check_channels, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_patches import Patches
from lipcore.layers.factor_sums import ChannelSum
from lipcore.layers.registry import register
from lipcore.layers.rule import GRAM_OR_DIRECT, Batch, Rule


class ConvTransposeRule(Rule):
    methods = GRAM_OR_DIRECT

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = tensor_argument(arguments, keywords)
        check_channels(x, batch, 2 + len(module.kernel_size))
        return ((as_autocast(x),) if is_trainable(module, "weight") else ()), None

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        factors: dict[str, Factor] = {}
        if saved:
            # The convolution whose transpose this is maps outputs to inputs; output_padding only makes outputs larger.
            factors["weight"] = Patches(
                grad_output,
                saved[0],
                module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
            )
        if is_trainable(module, "bias"):
            factors["bias"] = ChannelSum(grad_output)
        return factors


for _type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_type, ConvTransposeRule())
