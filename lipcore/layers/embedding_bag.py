"""Bags of embeddings: one sum or mean of rows per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipcore.layers.calls import argument, at_least_float32, is_trainable, tensor_argument
from lipcore.layers.embedding import SCALED_BY_BATCH, SUMS_OVER_INDICES
from lipcore.layers.factor import Factor
from lipcore.layers.factor_indexed import Indexed
from lipcore.layers.factor_rows import packed
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule


class EmbeddingBagRule(Rule):
    methods = ()
    how = SUMS_OVER_INDICES

    def leaves(self, module: Any) -> str:
        return "its rule is for mode='sum' and 'mean'" if module.mode == "max" else ""

    def refuses(self, module: Any) -> str:
        return SCALED_BY_BATCH if module.scale_grad_by_freq else ""

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        indices = tensor_argument(arguments, keywords)
        starts = argument(arguments, keywords, 1, "offsets")
        weights = argument(arguments, keywords, 2, "per_sample_weights")
        bags = indices.shape[0] if starts is None else starts.shape[0] - bool(module.include_last_offset)
        if bags != batch.size or batch.offsets is not None:
            raise ValueError(
                f"expected one bag per sample, {batch.size}, got {bags}; samples cannot be told apart. The number of "
                "samples is that of the model's first tensor argument: let that be the offsets, or pass indices [B, n]"
            )
        readable = starts is not None and starts.is_cpu and not torch.compiler.is_compiling()
        if module.include_last_offset and readable and starts[-1] != indices.numel():
            # torch drops the rest for mode="sum" and adds it to the last bag for mode="mean".
            raise ValueError(
                f"offsets: expected the last one to be the number of indices, {indices.numel()}, "
                f"got {int(starts[-1])}; drop the indices behind the last bag"
            )
        if not is_trainable(module, "weight"):
            return (), None
        present = [t for t in (starts, weights) if t is not None]
        return (indices, *present), (starts is not None, weights is not None)

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        if not saved:
            return {}
        has_starts, has_weights = extra
        indices, weights = saved[0], saved[-1] if has_weights else None
        offsets = self._offsets(module, saved[1], len(indices)) if has_starts else None
        if offsets is None:
            grad = grad_output.unsqueeze(1).expand(*indices.shape, -1)
            kept = torch.ones_like(indices) if module.padding_idx is None else (indices != module.padding_idx).long()
            count = kept.sum(1, keepdim=True)
        else:
            indices, offsets = packed(indices, offsets)
            bag = torch.bucketize(torch.arange(len(indices), device=indices.device), offsets[1:], right=True)
            grad = grad_output[bag.clamp(max=len(grad_output) - 1)]  # indices behind the last bag belong to none
            kept = torch.ones_like(indices) if module.padding_idx is None else (indices != module.padding_idx).long()
            count = torch.zeros_like(offsets).index_add(0, bag, kept)[bag]
        if module.mode == "mean":
            weights = (1 / count.clamp(min=1).to(at_least_float32(grad).dtype)).expand(indices.shape)
        return {
            "weight": Indexed(
                indices, grad, module.num_embeddings, weights=weights, padding_idx=module.padding_idx, offsets=offsets
            )
        }

    @staticmethod
    def _offsets(module: Any, starts: Tensor, total: int) -> Tensor:
        """Return boundaries [B + 1]; the end of the last bag is given or is the end of all."""
        starts = starts.long()
        return starts if module.include_last_offset else torch.cat([starts, starts.new_full((1,), total)])


register(nn.EmbeddingBag, EmbeddingBagRule())
