r"""Linear layers, :math:`y = x W^T + b` over the last dimension."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lipcore.functional.linear import ways
from lipcore.layers.calls import as_autocast, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_sums import RowSum
from lipcore.layers.registry import register
from lipcore.layers.rule import BY_SIZES, GRAM_OR_DIRECT, Batch, Cut, Rule


class LinearRule(Rule):
    methods = (*GRAM_OR_DIRECT, "estimate")
    cuts: ClassVar = {"weight": {0: Cut(output=-1), 1: Cut(input=-1)}, "bias": {0: Cut(output=-1)}}

    def fuses(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    def ways(self, module: Any) -> str:
        # A class of one's own under this rule may call its sizes anything.
        if not isinstance(module, nn.Linear):
            return BY_SIZES
        return ways(module.in_features, module.out_features, next(module.parameters()).device)

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = tensor_argument(arguments, keywords)
        batch.check(x)
        return ((as_autocast(x),) if is_trainable(module, "weight") else ()), batch

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        batch: Batch = extra
        grad = batch.tokens(grad_output)
        factors: dict[str, Factor] = {}
        if saved:
            factors["weight"] = Outer(batch.tokens(saved[0]), grad, batch.offsets)
        if is_trainable(module, "bias"):
            factors["bias"] = RowSum(grad, None, batch.offsets)
        return factors


register(nn.Linear, LinearRule())
