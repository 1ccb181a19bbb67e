"""LayerNorm over one or several dimensions, with or without a bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore.layers.norm import FeatureNormRule
from lipcore.layers.registry import register


class LayerNormRule(FeatureNormRule):
    center = True

    def eps(self, module: Any, x: Tensor) -> float | None:
        return float(module.eps)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        return nnf.layer_norm(x, module.normalized_shape, eps=module.eps)


register(nn.LayerNorm, LayerNormRule())
