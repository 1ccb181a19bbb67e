r"""Bilinear layers, :math:`y_o = x_1^T W_o x_2 + b_o`: linear in the products of their inputs' entries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.calls import apart_from_autocast, at_least_float32, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_sums import RowSum
from lipcore.layers.registry import register
from lipcore.layers.rule import GRAM_OR_DIRECT, Batch, Rule


class BilinearRule(Rule):
    methods = GRAM_OR_DIRECT

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        inputs = tuple(tensor_argument(arguments, keywords, i, f"input{i + 1}") for i in range(2))
        for x in inputs:
            batch.check(x)
        return (tuple(map(apart_from_autocast, inputs)) if is_trainable(module, "weight") else ()), batch

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        batch: Batch = extra
        grad = batch.tokens(grad_output)
        factors: dict[str, Factor] = {}
        if saved:
            x1, x2 = (batch.tokens(at_least_float32(x)) for x in saved)
            shape = grad.shape[-1:] + x1.shape[-1:] + x2.shape[-1:]
            products = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
            factors["weight"] = Outer(products, grad, batch.offsets, shape=shape)
        if is_trainable(module, "bias"):
            factors["bias"] = RowSum(grad, None, batch.offsets)
        return factors


register(nn.Bilinear, BilinearRule())
