"""LayerNorm, RMSNorm, GroupNorm, InstanceNorm, and BatchNorm where it does not mix samples.

The normalised input is computed again from the input, never from the output: (y - bias) / weight fails where weight
is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore.layers.factor import Factor
from lipcore.layers.factors import ChannelSum, RowSum
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule, argument


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _LastDimensions(Rule):
    """Normalised over the last dimensions of [B, ..., *normalized_shape]."""

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = argument(arguments, keywords, 0, self.argument_name)
        batch.tokens(x, len(module.normalized_shape))  # whether it has a batch dimension
        return (x,), batch

    argument_name = "input"

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        shape = list(module.normalized_shape)

        def flat(x: Tensor) -> Tensor:
            tokens: Tensor = extra.tokens(x, len(shape))
            return tokens.flatten(-len(shape))

        grad, offsets = flat(grad_output), extra.offsets
        x_hat = flat(self.normalized(module, _wide(saved[0])))
        found: dict[str, Factor] = {"weight": RowSum(grad, x_hat, offsets=offsets, shape=shape)}
        if getattr(module, "bias", None) is not None:
            found["bias"] = RowSum(grad, offsets=offsets, shape=shape)
        return found

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        raise NotImplementedError


class LayerNormRule(_LastDimensions):
    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


class RMSNormRule(_LastDimensions):
    argument_name = "x"

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        return F.rms_norm(x, module.normalized_shape, eps=eps)


class _Channels(Rule):
    """Scale and shift per channel of [B, C, *space]."""

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = argument(arguments, keywords, 0, "input")
        batch.check_first(x, self.dimensions(module))
        return (x,), None

    def dimensions(self, module: nn.Module) -> int | None:
        return None

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        x_hat = self.normalized(module, _wide(saved[0]))
        found: dict[str, Factor] = {"weight": ChannelSum(grad_output, x_hat)}
        if module.bias is not None:
            found["bias"] = ChannelSum(grad_output)
        return found

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        raise NotImplementedError


class GroupNormRule(_Channels):
    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return F.group_norm(x, module.num_groups, eps=module.eps)


class _WithStatistics(_Channels):
    def from_running(self, module: Any, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, variance = (t.to(x.dtype).reshape(shape) for t in (module.running_mean, module.running_var))
        normalized: Tensor = (x - mean) * (variance + module.eps).rsqrt()
        return normalized


class InstanceNormRule(_WithStatistics):
    _dimensions = ((nn.InstanceNorm1d, 3), (nn.InstanceNorm2d, 4), (nn.InstanceNorm3d, 5))

    def dimensions(self, module: nn.Module) -> int | None:
        return next((n for kind, n in self._dimensions if isinstance(module, kind)), None)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        if module.training or not module.track_running_stats:
            return F.instance_norm(x, eps=module.eps)
        return self.from_running(module, x)


class BatchNormRule(_WithStatistics):
    """In eval mode, where its statistics are constants."""

    def refuses(self, module: Any) -> str:
        if not module.training and module.running_mean is not None:
            return ""
        return (
            "its statistics are over the batch, so a sample's loss depends on the other samples and there is no "
            "per-sample gradient; use GroupNorm, or put the module in eval mode before it is watched"
        )

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return self.from_running(module, x)


register(nn.LayerNorm, LayerNormRule())
register(nn.RMSNorm, RMSNormRule())
register(nn.GroupNorm, GroupNormRule())
for _instance_norm in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    register(_instance_norm, InstanceNormRule())
for _batch_norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(_batch_norm, BatchNormRule())
