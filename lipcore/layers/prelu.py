"""PReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.layers.factor import Factor
from lipcore.layers.factors import ChannelSum, Dense
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule, argument


class PReLURule(Rule):
    """a * min(x, 0): one slope, or one per channel of [B, C, ...]."""

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = argument(arguments, keywords, 0, "input")
        batch.check_first(x, None)
        return (x,), None

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        negative = saved[0].clamp(max=0)
        if module.num_parameters > 1:
            return {"weight": ChannelSum(grad_output, negative)}
        terms = grad_output.to(torch.float64) * negative
        return {"weight": Dense(terms.reshape(terms.shape[0], -1).sum(1, keepdim=True))}


register(torch.nn.PReLU, PReLURule())
