"""MultiheadAttention: its projections are computed by functions and not by modules, so one rule covers them all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipcore.layers.attention_backward import Attention
from lipcore.layers.calls import argument, as_autocast, is_trainable, tensor_argument
from lipcore.layers.factor import Factor
from lipcore.layers.factor_dense import Blocks
from lipcore.layers.factor_outer import Outer
from lipcore.layers.factor_sums import RowSum
from lipcore.layers.registry import register
from lipcore.layers.rule import GRAM_OR_DIRECT, Batch, Rule

_INPUTS = ("query", "key", "value")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_VECTORS = ("in_proj_bias", "bias_k", "bias_v")
_MASKS = ("key_padding_mask", "attn_mask")


class MultiheadAttentionRule(Rule):
    """The rule of MultiheadAttention: grad_output is the gradient at the first output; the second, the attention
    weights, must not enter the loss."""

    methods = GRAM_OR_DIRECT
    in_place_after = False  # the output is part of a tuple
    beside = "attention weights that enter the loss, which its rule does not know; call it with need_weights=False, "

    def leaves(self, module: Any) -> str:
        if module.training and module.dropout > 0:
            how = f"its dropout of {module.dropout} in the backward pass (it can with 0, or eval())"
            return f"its rule cannot repeat {how}"
        return ""

    def sample_dim(self, module: Any, grad_output: Tensor, batch: Batch) -> int:
        return 0 if module.batch_first else 1

    def save(
        self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        if reason := self.leaves(module):  # the mode may change after coverage was decided
            raise ValueError(f"MultiheadAttention: {reason}")
        found = {name: tensor_argument(arguments, keywords, i, name) for i, name in enumerate(_INPUTS)}
        for name, x in found.items():
            if batch.offsets is not None or x.dim() != 3 or x.shape[0 if module.batch_first else 1] != batch.size:
                wanted = f"[{batch.size}, T, features]" if module.batch_first else f"[T, {batch.size}, features]"
                raise ValueError(f"{name}: expected {wanted} (batch_first={module.batch_first}), got {list(x.shape)}")
        need_weights = argument(arguments, keywords, 4, "need_weights", True)
        masks = {name: argument(arguments, keywords, i, name) for name, i in zip(_MASKS, (3, 5), strict=True)}
        # As torch does: then the mask itself is not read.
        causal = argument(arguments, keywords, 7, "is_causal", False) and masks["key_padding_mask"] is None
        causal = bool(causal and not need_weights)
        if causal:
            masks["attn_mask"] = None
        kept = _inputs_kept(found, module.batch_first) | _weights_kept(module, found)
        # torch keeps none of these, which may be filled anew before the backward pass.
        filled = {name: module._parameters.get(name) for name in _VECTORS} | masks
        kept |= {name: t.detach().clone() for name, t in filled.items() if t is not None}
        return tuple(kept.values()), (tuple(kept), causal, bool(need_weights))

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        names, causal, need_weights = extra
        # Everything but the masks, whose types say what they mean, with the batch first.
        tensors = {name: t.detach() for name, t in zip(names, saved, strict=True)}
        inputs = [tensors[name] for name in _INPUTS]
        if not module.batch_first:
            inputs, grad_output = [x.transpose(0, 1) for x in inputs], grad_output.transpose(0, 1)
        attention = Attention(module, inputs, tensors, causal=causal, safe=not need_weights)
        grad = grad_output.detach()
        factors: dict[str, Factor] = {}
        context, grads, extra_grads = attention.backward(grad)
        if is_trainable(module.out_proj, "weight"):
            factors["out_proj.weight"] = Outer(context, grad)
        if is_trainable(module.out_proj, "bias"):
            factors["out_proj.bias"] = RowSum(grad)
        pairs = list(zip(inputs, grads, strict=True))
        if is_trainable(module, "in_proj_weight"):
            factors["in_proj_weight"] = Blocks([Outer(x, g) for x, g in pairs])
        for name, (x, g) in zip(_SEPARATE, pairs, strict=True):
            if is_trainable(module, name):
                factors[name] = Outer(x, g)
        if is_trainable(module, "in_proj_bias"):
            factors["in_proj_bias"] = Blocks([RowSum(g) for g in grads])
        for name, g in zip(("bias_k", "bias_v"), extra_grads, strict=True):
            if is_trainable(module, name):
                factors[name] = RowSum(g, shape=tensors[name].shape)
        return factors


def _inputs_kept(inputs: dict[str, Tensor], batch_first: bool) -> dict[str, Tensor]:
    """Return query, key and value as torch keeps them: with the batch first they are transposed, and that is copied.

    Self-attention has one tensor three times, and one copy.
    """
    copies: dict[int, Tensor] = {}
    for x in inputs.values():
        if id(x) not in copies:
            cast = as_autocast(x)
            copies[id(x)] = x.detach().clone() if cast is x and batch_first else cast
    return {name: copies[id(x)] for name, x in inputs.items()}


def _weights_kept(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as torch keeps them: that of a projection only for a gradient at its input."""
    kept: dict[str, Tensor] = {"out_proj.weight": as_autocast(module.out_proj.weight)}
    needed = {"in_proj_weight": any(x.requires_grad for x in inputs.values())}
    needed |= {name: inputs[source].requires_grad for name, source in zip(_SEPARATE, _INPUTS, strict=True)}
    for name, is_needed in needed.items():
        weight = module._parameters.get(name)
        if weight is not None:
            cast = as_autocast(weight)
            kept[name] = cast if is_needed or cast is not weight else weight.detach().clone()
    return kept


register(nn.MultiheadAttention, MultiheadAttentionRule())
