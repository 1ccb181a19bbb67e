"""Convolutions of one to three dimensions, with every stride, dilation, padding, padding mode and number of groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore.layers.calls import as_autocast, check_channels, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_patches import Patches
from lipcore.layers.factor_sums import ChannelSum
from lipcore.layers.registry import register
from lipcore.layers.rule import GRAM_OR_DIRECT, Batch, Rule


class ConvRule(Rule):
    methods = GRAM_OR_DIRECT

    def sample_dim(self, module: nn.Module, grad_output: Tensor, batch: Batch) -> int:
        return 0

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = tensor_argument(arguments, keywords)
        check_channels(x, batch, 2 + len(module.kernel_size))
        if not is_trainable(module, "weight"):
            return (), None
        # As torch keeps it: x itself may be changed in place before the backward pass where it was padded or cast.
        x, padding = _padded(module, x.detach())
        return (as_autocast(x),), padding

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        factors: dict[str, Factor] = {}
        if saved:
            factors["weight"] = Patches(
                saved[0],
                grad_output,
                module.kernel_size,
                stride=module.stride,
                padding=extra,
                dilation=module.dilation,
                groups=module.groups,
            )
        if is_trainable(module, "bias"):
            factors["bias"] = ChannelSum(grad_output)
        return factors


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input that the convolution proper sees, and the zeros that it pads on both sides itself."""
    none = (0,) * len(module.kernel_size)
    if module.padding_mode != "zeros":
        return nnf.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), none
    if module.padding == "valid":
        return x, none
    if module.padding != "same":
        return x, module.padding
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if all(n % 2 == 0 for n in reach):
        return x, tuple(n // 2 for n in reach)
    # An odd number of zeros goes behind.
    return nnf.pad(x, [n for total in reversed(reach) for n in (total // 2, total - total // 2)]), none


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_type, ConvRule())
