"""GroupNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore.layers.calls import apart_from_autocast
from lipcore.layers.norm import ChannelNormRule
from lipcore.layers.registry import register


class GroupNormRule(ChannelNormRule):
    def kept(self, x: Tensor) -> Tensor:
        return apart_from_autocast(x)

    def normalized(self, module: Any, x: Tensor, *statistics: Tensor) -> Tensor:
        return nnf.group_norm(x, module.num_groups, eps=module.eps)


register(nn.GroupNorm, GroupNormRule())
