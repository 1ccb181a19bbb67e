"""Embeddings, where a sample may contain a token many times."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.calls import is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_indexed import Indexed
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule

SCALED_BY_BATCH = (
    "scale_grad_by_freq=True divides a token's gradient by its number in the whole batch, so that samples are mixed; "
    "use scale_grad_by_freq=False"
)
SUMS_OVER_INDICES = "sums over equal indices"


class EmbeddingRule(Rule):
    """The rule of Embedding. max_norm renormalises rows before they are read, and sparse=True only stores the gradient
    in another way: neither changes a gradient."""

    methods = ()
    how = SUMS_OVER_INDICES

    def refuses(self, module: Any) -> str:
        return SCALED_BY_BATCH if module.scale_grad_by_freq else ""

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        indices = tensor_argument(arguments, keywords)
        batch.check(indices, 0)
        return ((indices,) if is_trainable(module, "weight") else ()), batch

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        if not saved:
            return {}
        batch: Batch = extra
        return {
            "weight": Indexed(
                batch.tokens(saved[0], 0),
                batch.tokens(grad_output),
                module.num_embeddings,
                padding_idx=module.padding_idx,
                offsets=batch.offsets,
            )
        }


register(nn.Embedding, EmbeddingRule())
