"""Attention computed once more, and the gradients at its projections; float32 at least, a few samples at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from lipcore.layers.calls import at_least_float32

_CHUNK = 1 << 22  # attention probabilities that are held at a time


class Attention:
    """A call of a MultiheadAttention, computed once more.

    Args:
        inputs: query, key and value, [B, T, features].
        tensors: the module's parameters by name, and the masks.
        safe: a query that may see no key attends to nothing; otherwise it gives NaN. torch does the former where no
            weights are asked for, and the latter where they are.
    """

    def __init__(
        self, module: Any, inputs: list[Tensor], tensors: dict[str, Tensor], *, causal: bool, safe: bool
    ) -> None:
        self.module, self.tensors, self.causal, self.safe = module, tensors, causal, safe
        self.dtype = torch.promote_types(inputs[0].dtype, torch.float32)
        self.inputs = [at_least_float32(x) for x in inputs]

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the out-projection's input [B, T, E]; gradients at projected queries, keys and values [B, T or S, E];
        and at bias_k and bias_v [B, 1, E], if the module has them."""
        projected = self._projected()
        samples, queries, _ = projected[0].shape
        keys = projected[1].shape[1]
        grad_context = grad.to(self.dtype) @ self._parameter("out_proj.weight")
        step = max(1, _CHUNK // max(1, self.module.num_heads * queries * keys))
        parts = []
        for first in range(0, max(1, samples), step):
            some = slice(first, min(first + step, samples))
            parts.append(self._some([t[some] for t in projected], grad_context[some], some))
        context, *grads = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        sources = self.inputs[1].shape[1]
        extra = [g[:, sources : sources + 1] for g in grads[1:]] if "bias_k" in self.tensors else []
        return context, [grads[0], grads[1][:, :sources], grads[2][:, :sources]], extra or [context[:, :0]] * 2

    def _projected(self) -> list[Tensor]:
        """Return queries, keys and values before they are split into heads, with what is appended to the latter two."""
        width = self.module.embed_dim
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if "in_proj_weight" in self.tensors:
            weights = list(self._parameter("in_proj_weight").split(width))
        else:
            weights = [self._parameter(name) for name in names]
        biases = self._parameter("in_proj_bias").split(width) if "in_proj_bias" in self.tensors else (None,) * 3
        projected = [nnf.linear(x, w, b) for x, w, b in zip(self.inputs, weights, biases, strict=True)]
        for i, name in ((1, "bias_k"), (2, "bias_v")):
            if name in self.tensors:
                row = self._parameter(name).reshape(1, 1, width).expand(len(projected[i]), 1, width)
                projected[i] = torch.cat([projected[i], row], 1)
            if self.module.add_zero_attn:
                projected[i] = nnf.pad(projected[i], (0, 0, 0, 1))
        return projected

    def _some(self, projected: list[Tensor], grad_context: Tensor, some: slice) -> tuple[Tensor, ...]:
        heads, scale = self.module.num_heads, (self.module.embed_dim // self.module.num_heads) ** -0.5
        q, k, v, g = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (*projected, grad_context))
        scores = (q * scale) @ k.transpose(-1, -2)
        hidden = self._hidden(scores, some)
        scores = scores if hidden is None else scores + hidden
        p = scores.softmax(-1)
        if self.safe:
            p = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0, p)
        grad_p = g @ v.transpose(-1, -2)
        grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
        out = p @ v, grad_scores @ k, grad_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g
        return tuple(t.transpose(1, 2).flatten(2) for t in out)

    def _hidden(self, scores: Tensor, some: slice) -> Tensor | None:
        """Return what is added to the scores, up to [samples, heads, T, S]: both masks, and zeros for appended keys."""
        _, heads, queries, keys = scores.shape
        total = None
        if self.causal:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
            total = torch.zeros_like(seen, dtype=scores.dtype).masked_fill(~seen, -torch.inf)
        if "attn_mask" in self.tensors:
            mask = self._added(self.tensors["attn_mask"], keys)
            total = mask.unflatten(0, (-1, heads))[some] if mask.dim() == 3 else mask
        if "key_padding_mask" in self.tensors:
            padding = self._added(self.tensors["key_padding_mask"], keys)[some][:, None, None]
            total = padding if total is None else total + padding
        return total

    def _added(self, mask: Tensor, keys: int) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(mask, -torch.inf)
        return nnf.pad(mask.to(self.dtype), (0, keys - mask.shape[-1]))

    def _parameter(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)
