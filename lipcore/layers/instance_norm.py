"""InstanceNorm, by each sample's own statistics or, where it tracks them, in eval mode by running ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore.layers.batch_norm import by_running_statistics
from lipcore.layers.norm import ChannelNormRule
from lipcore.layers.registry import register


class InstanceNormRule(ChannelNormRule):
    def __init__(self, dims: int) -> None:
        self._dims = dims

    def dims(self, module: Any) -> int:
        return self._dims  # one less is a sample without a batch

    def save_statistics(self, module: Any) -> tuple[Tensor, ...]:
        own = module.training or not module.track_running_stats
        # torch repeats them for every sample, so that a pass in train mode may change them before the backward pass.
        return () if own else (module.running_mean.clone(), module.running_var.clone())

    def normalized(self, module: Any, x: Tensor, *statistics: Tensor) -> Tensor:
        if statistics:
            return by_running_statistics(x, statistics, module.eps)
        return nnf.group_norm(x, x.shape[1], eps=module.eps)  # instance_norm() refuses a space of one element


register(nn.InstanceNorm1d, InstanceNormRule(3))
register(nn.InstanceNorm2d, InstanceNormRule(4))
register(nn.InstanceNorm3d, InstanceNormRule(5))
