"""BatchNorm with running statistics, which treats samples alike and apart; with batch statistics it mixes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.norm import ChannelNormRule
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch
from lipcore.models.checks import has_statistics, mixes_samples

_MIXED = (
    "normalises by the statistics of the batch, so that every sample's output depends on all samples and there are no "
    "per-sample gradients, of this layer and of those before it; "
)
_WAYS_OUT = {
    True: "use eval() on it (frozen running statistics) or GroupNorm",
    False: "it has no running statistics, so that eval() changes nothing: use GroupNorm",
}


def by_running_statistics(x: Tensor, statistics: tuple[Tensor, ...], eps: float) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, variance = statistics
    mean, rstd = mean.to(x.dtype), (variance.to(x.dtype) + eps).rsqrt()
    return (x - mean.reshape(shape)) * rstd.reshape(shape)


class BatchNormRule(ChannelNormRule):
    may_mix_samples = True

    def refuses(self, module: Any) -> str:
        return _MIXED + _WAYS_OUT[has_statistics(module)] if mixes_samples(module) else ""

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        if reason := self.refuses(module):  # the mode may change after coverage was decided
            raise ValueError(f"{type(module).__name__} {reason}")
        return super().save(module, arguments, keywords, batch)

    def save_statistics(self, module: Any) -> tuple[Tensor, ...]:
        return module.running_mean, module.running_var

    def normalized(self, module: Any, x: Tensor, *statistics: Tensor) -> Tensor:
        return by_running_statistics(x, statistics, module.eps)


for _type in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(_type, BatchNormRule())
