"""RMSNorm over one or several dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore.layers.norm import FeatureNormRule
from lipcore.layers.registry import register


class RMSNormRule(FeatureNormRule):
    def normalized(self, module: Any, x: Tensor) -> Tensor:
        # eps=None is the eps of the type that is computed in, float32 for bfloat16, and x is in that type here.
        return nnf.rms_norm(x, module.normalized_shape, None, module.eps)


register(nn.RMSNorm, RMSNormRule())
