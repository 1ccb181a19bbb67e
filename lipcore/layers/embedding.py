"""Embeddings, where a sample may contain a token many times."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lipcore.layers.calls import is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_indexed import Indexed
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Cut, Rule
from lipcore.models.dtensors import is_one_block, local_of
from lipcore.models.torch_internals import shard_of

SCALED_BY_BATCH = (
    "scale_grad_by_freq=True divides a token's gradient by its number in the whole batch, so that samples are mixed; "
    "use scale_grad_by_freq=False"
)
NO_BLOCK = (
    "this rank has rows of the table that are not one block of it (a packed parameter), and nobody knows here which "
    "indices these belong to; on_unsupported='skip' leaves it out"
)
SUMS_OVER_INDICES = "sums over equal indices"


class _RowsHere(NamedTuple):
    """The samples, and how many rows of the table are on this rank."""

    batch: Batch
    rows: int


class EmbeddingRule(Rule):
    """The rule of Embedding. max_norm renormalises rows before they are read, and sparse=True only stores the gradient
    in another way: neither changes a gradient."""

    methods = ()
    how = SUMS_OVER_INDICES
    cuts: ClassVar = {"weight": {0: Cut(), 1: Cut(output=-1)}}

    def refuses(self, module: Any) -> str:
        return SCALED_BY_BATCH if module.scale_grad_by_freq else ""

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        indices = tensor_argument(arguments, keywords)
        batch.check(indices, 0)
        if not is_trainable(module, "weight"):
            return (), batch
        weight = module.weight
        if not hasattr(weight, "placements"):
            return (indices,), batch
        (rows, _), (first, _) = shard_of(weight)
        if rows == len(weight):
            return (indices,), batch
        if not is_one_block(weight):
            raise ValueError(NO_BLOCK)
        indices = local_of(indices) - first
        elsewhere = (indices < 0) | (indices >= rows)  # in the part of another rank
        if module.padding_idx is not None:
            elsewhere |= indices == module.padding_idx - first
        return (indices.masked_fill(elsewhere, 0), elsewhere), _RowsHere(batch, rows)

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        if not saved:
            return {}
        batch, rows = extra if isinstance(extra, _RowsHere) else (extra, module.num_embeddings)
        indices, grad = batch.tokens(saved[0], 0), batch.tokens(grad_output)
        padding = module.padding_idx
        if len(saved) > 1:  # of some rows, and the gradient of the others is none here
            grad, padding = grad.masked_fill(batch.tokens(saved[1], 0).unsqueeze(-1), 0), None
        return {"weight": Indexed(indices, grad, rows, padding_idx=padding, offsets=batch.offsets)}


register(nn.Embedding, EmbeddingRule())
