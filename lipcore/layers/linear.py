"""Linear and Bilinear."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.factor import Factor
from lipcore.layers.factors import Outer, RowSum
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule, argument


class LinearRule(Rule):
    """y = x W^T + b on inputs [B, features] to [B, ..., features]."""

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        return (batch.tokens(argument(arguments, keywords, 0, "input")),), batch

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        grad = extra.tokens(grad_output)
        found: dict[str, Factor] = {"weight": Outer(saved[0], grad, offsets=extra.offsets)}
        if module.bias is not None:
            found["bias"] = RowSum(grad, offsets=extra.offsets)
        return found


class BilinearRule(Rule):
    """y_o = x_1^T W_o x_2 + b_o: a Linear on the products of the entries of both inputs."""

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        first, second = (argument(arguments, keywords, i, f"input{i + 1}") for i in (0, 1))
        return (batch.tokens(first), batch.tokens(second)), batch

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        grad, (first, second) = extra.tokens(grad_output), saved
        products = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        shape = module.weight.shape
        found: dict[str, Factor] = {"weight": Outer(products, grad, offsets=extra.offsets, shape=shape)}
        if module.bias is not None:
            found["bias"] = RowSum(grad, offsets=extra.offsets)
        return found


register(nn.Linear, LinearRule())
register(nn.Bilinear, BilinearRule())
