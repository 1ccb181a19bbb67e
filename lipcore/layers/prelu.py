r"""PReLU, :math:`y = \max(0, x) + a \min(0, x)`, with one slope or one per channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.calls import as_autocast, check_channels, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_sums import ChannelSum, RowSum
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule


class PReLURule(Rule):
    methods = ()
    how = "sums over positions"

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        x = tensor_argument(arguments, keywords)
        if module.num_parameters > 1:  # channels are the second dimension, wherever the batch of other layers is
            check_channels(x, batch)
        else:
            batch.check(x, 0)
        return ((as_autocast(x),) if is_trainable(module, "weight") else ()), batch

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        if not saved:
            return {}
        batch: Batch = extra
        negative = saved[0].detach().clamp(max=0)
        if module.num_parameters > 1:
            return {"weight": ChannelSum(grad_output, negative)}
        if batch.offsets is None:
            grad, negative = (batch.tokens(t, 0).unsqueeze(-1) for t in (grad_output, negative))
            return {"weight": RowSum(grad, negative)}
        # Every element is a row of one feature: the width of a row lengthens the documents.
        offsets = batch.offsets * grad_output.shape[-1]
        return {"weight": RowSum(grad_output.reshape(-1, 1), negative.reshape(-1, 1), offsets)}


register(nn.PReLU, PReLURule())
