"""Adapters as fine-tuning has them, whose matrices are used outside their own layers; a rule for any such module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import layers


class LowRank(nn.Module):
    """A frozen layer and two matrices of rank 2."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    @property
    def product(self) -> Tensor:
        return self.B.weight @ self.A.weight


class DoRA(LowRank):
    """A direction, which the matrices move, and a magnitude of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base, base.in_features, base.out_features)
        self.magnitude = nn.Parameter(base.weight.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.product
        scale = self.magnitude / weight.norm(dim=1).detach()
        return F.linear(x, scale[:, None] * weight, self.base.bias)


class AttentionLoRA(LowRank):
    """Attention whose projections the matrices move."""

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__(base, base.embed_dim, 3 * base.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        base, rows = self.base, x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            *(rows, rows, rows, base.embed_dim, base.num_heads, base.in_proj_weight + self.product),
            *(base.in_proj_bias, None, None, False, 0.0, base.out_proj.weight, base.out_proj.bias),
            need_weights=False,
        )
        return y.transpose(0, 1)


class OneByOne(layers.Rule):
    """The rule of any module: autograd, one sample at a time."""

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: layers.Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        return (arguments[0],), None

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, layers.Factor]:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        rows: list[tuple[Tensor, ...]] = []
        with torch.enable_grad():
            for x, gradient in zip(saved[0].split(1), grad_output.split(1), strict=True):
                out = module.forward(x.detach())
                rows.append(torch.autograd.grad(out, list(trained.values()), gradient))
        columns = zip(*rows, strict=True)
        return {name: layers.Dense(torch.stack(column)) for name, column in zip(trained, columns, strict=True)}
