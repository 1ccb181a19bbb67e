"""Embedding and EmbeddingBag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipcore.layers.factor import Factor
from lipcore.layers.factors import Indexed
from lipcore.layers.registry import register
from lipcore.layers.rule import Batch, Rule, argument


def _refuses(module: Any) -> str:
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides by counts over the whole batch, so no sample has a gradient of its own"
    return ""


class EmbeddingRule(Rule):
    """Rows of the weight; a max_norm changes the weight before it is read, not the gradient."""

    def refuses(self, module: nn.Module) -> str:
        return _refuses(module)

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        return (batch.tokens(argument(arguments, keywords, 0, "input"), 0),), batch

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        indices, grad = saved[0], extra.tokens(grad_output)
        return {
            "weight": Indexed(
                indices, grad, module.num_embeddings, padding_idx=module.padding_idx, offsets=extra.offsets
            )
        }


class EmbeddingBagRule(Rule):
    """Sums, weighted sums and means of rows; a sample is a bag."""

    def refuses(self, module: nn.Module) -> str:
        if module.mode == "max":
            return "mode='max' has no rule; use mode='sum' or 'mean'"
        return _refuses(module)

    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        indices = argument(arguments, keywords, 0, "input")
        starts = argument(arguments, keywords, 1, "offsets", None)
        weights = argument(arguments, keywords, 2, "per_sample_weights", None)
        bags = len(indices) if starts is None else len(starts) - bool(module.include_last_offset)
        if bags != batch.size:
            raise ValueError(f"expected {batch.size} bags, one per sample, got {bags}")
        tensors = (indices, *(t for t in (starts, weights) if t is not None))
        return tensors, (starts is not None, weights is not None)

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        indices, *rest = saved
        has_starts, has_weights = extra
        starts = rest.pop(0) if has_starts else None
        weights = rest.pop(0) if has_weights else None
        padding, samples = module.padding_idx, grad_output.shape[0]
        kept = torch.ones_like(indices, dtype=torch.float64) if padding is None else (indices != padding).double()
        if starts is None:
            grad = grad_output.unsqueeze(1).expand(-1, indices.shape[1], -1)
            count = kept.sum(1, keepdim=True)
            offsets = None
        else:
            offsets = torch.cat([starts[:samples], starts.new_tensor([len(indices)])]).to(torch.int64)
            bag = torch.repeat_interleave(torch.arange(samples, device=indices.device), offsets.diff())
            grad = grad_output[bag]
            count = kept.new_zeros(samples).index_add_(0, bag, kept)[bag]
        if module.mode == "mean":
            weights = kept / count.clamp(min=1)
        return {
            "weight": Indexed(
                indices, grad, module.num_embeddings, padding_idx=padding, weights=weights, offsets=offsets
            )
        }


register(nn.Embedding, EmbeddingRule())
register(nn.EmbeddingBag, EmbeddingBagRule())
