"""RMSNorm over one or several dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore.layers.norm import FeatureNormRule
from lipcore.layers.registry import register


class RMSNormRule(FeatureNormRule):
    def kept(self, x: Tensor) -> Tensor:
        # On the CPU it is a composition of operations, of which the first casts to float32 and, without a gradient for
        # x, none keeps its input.
        own = x.requires_grad and x.dtype in (torch.float32, torch.float64)
        return super().kept(x) if own or not x.is_cpu else x.detach().clone()

    def eps(self, module: Any, x: Tensor) -> float | None:
        computed = torch.promote_types(x.dtype, torch.float32)
        return float(torch.finfo(computed).eps if module.eps is None else module.eps)

    def normalized(self, module: Any, x: Tensor) -> Tensor:
        # eps=None is the eps of the type that is computed in, float32 for bfloat16, and x is in that type here.
        return nnf.rms_norm(x, module.normalized_shape, None, module.eps)


register(nn.RMSNorm, RMSNormRule())
