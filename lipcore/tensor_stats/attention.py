"""Bounds of attention logits, per head, from what the projections to queries and keys return.

By Cauchy and Schwarz no logit q_i . k_j * scale is larger than max_i |q_i| max_j |k_j| scale. What is multiplied inside
``scaled_dot_product_attention`` no hook sees, so it is read where the projections return it. Rotations of queries and
keys (RoPE) change no norm; what is added to logits (masks, position biases) or done to them later is not in the bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.functional.sample_norms import sample_norms
from lipcore.metric.results import MetricResult, Value
from lipcore.models.arguments import is_integer
from lipcore.models.names import listed, named_modules, with_prefix
from lipcore.tensor_stats.extra import Extra, matching_modules

#: By the name of an attention module or a pattern of such: (queries, keys, heads) or (queries, keys, heads, scale), the
#: names of the projections in it; or (all three, heads) or (all three, heads, scale) for one projection to queries,
#: keys and values, in this order.
AttentionChoice = Mapping[str, Sequence[Any]]

_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("wq", "wk"), ("q_lin", "k_lin"))
_ALL_IN_ONE = ("query_key_value", "qkv_proj", "Wqkv", "qkv", "to_qkv", "c_attn", "in_proj_qkv")
_FUSED = {"GPT2Attention": "c_attn", "CausalSelfAttention": "c_attn", "Attention": "qkv"}  # by class, of thirds
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("norm_q", "norm_k"), ("query_norm", "key_norm"))
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "dim_head")
_SCALE = ("scaling", "scale", "softmax_scale")
FOUND = (
    "found by the names of modules: a bound where nothing but rotations comes between these projections and the product"
)


class HeadBounds(Extra):
    """max |q| max |k| scale of every head of one attention module, once per forward pass.

    Args:
        place: name of the attention module.
        query, key: names of the modules whose outputs are read; the same for one that returns queries, keys and values.
        heads: number of heads of the queries.
        head_dim: features of a head, where they are known.
        scale: what products are multiplied with; None: 1 / sqrt(features of a head).
        named: by the user.
        flat: whether heads lie beside each other in the last dimension, as linear layers return them; else there may be
            a dimension of heads.
    """

    kind = "attention"

    def __init__(
        self,
        place: str,
        query: str,
        key: str,
        heads: int,
        head_dim: int | None,
        scale: float | None,
        *,
        named: bool,
        flat: bool,
    ) -> None:
        self._flat = flat
        self.place, self.heads, self._head_dim, self._scale, self.named = place, heads, head_dim, scale, named
        self._query, self._key = query, key
        self.modules = (query,) if query == key else (query, key)
        self.sums, self.most = heads + 1, heads
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None

    @classmethod
    def described(cls, place: str, sums: int, most: int, *, named: bool) -> HeadBounds:
        return cls(place, "", "", most, None, None, named=named, flat=True)

    @property
    def rule(self) -> str:
        whose = self._query if self._query == self._key else f"{self._query}, {self._key}"
        scale = "1/sqrt(d)" if self._scale is None else f"{self._scale:.4g}"
        return f"max|q| max|k| {scale} of {self.heads} heads, from {whose}{'' if self.named else ', found by name'}"

    def begin(self) -> None:
        self._queries = self._keys = None

    def read(self, module: str, output: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._query == self._key:
            if output.shape[-1] % 3:
                raise ValueError(f"'{module}' returns {output.shape[-1]} features, which are no three equal parts")
            queries, keys, _ = output.chunk(3, dim=-1)
            self._queries, self._keys = self._norms(module, queries), self._norms(module, keys, of_keys=True)
        elif module == self._query:
            self._queries = self._norms(module, output)
        else:
            self._keys = self._norms(module, output, of_keys=True)
        if self._queries is None or self._keys is None:
            return None
        queries, keys = self._queries, self._keys
        self._queries = self._keys = None
        if self.heads % len(keys):
            raise ValueError(f"{self.heads} heads of queries do not share {len(keys)} heads of keys")
        bound = queries * keys.repeat_interleave(self.heads // len(keys)) * self._factor
        return torch.cat([bound, bound.new_ones(1)]), bound

    def _norms(self, module: str, output: Tensor, *, of_keys: bool = False) -> Tensor:
        """Return the largest norm of each head, float64."""
        width, size = output.shape[-1], self._head_dim
        split = output.dim() > 3 if size is None else width == size and self.heads > 1
        if split and not self._flat:
            return self._norms_of_split(module, output)
        if size is None:
            if of_keys and self._query != self._key and self._dim is not None:
                size = self._dim
            elif width % self.heads:
                raise ValueError(f"'{module}' returns {width} features, which {self.heads} heads do not share alike")
            else:
                size = width // self.heads
        if width % size or (not of_keys and width // size != self.heads):
            raise ValueError(f"'{module}' returns {width} features, not {self.heads} heads of {size}")
        self._dim = size
        norms = sample_norms(output.reshape(-1, size)).view(-1, width // size)
        return norms.amax(0) if len(norms) else norms.new_zeros(norms.shape[1])

    def _norms_of_split(self, module: str, output: Tensor) -> Tensor:
        """Return them of what has a dimension of heads, second or third from behind."""
        sizes = output.shape[-3:-1]
        fits = [size for size in sizes if self.heads % size == 0 and size > 1]
        if output.dim() < 3 or len(fits) != 1:
            raise ValueError(f"'{module}' returns {list(output.shape)}, where the dimension of heads is not clear")
        axis = output.dim() - (3 if sizes[0] == fits[0] else 2)
        self._dim = output.shape[-1]
        norms = sample_norms(output.reshape(-1, self._dim)).view(output.shape[:-1])
        return norms.movedim(axis, -1).reshape(-1, fits[0]).amax(0)

    _dim: int | None = None  # features of a head, once queries came

    @property
    def _factor(self) -> float:
        assert self._dim is not None
        return float(self._dim**-0.5) if self._scale is None else self._scale

    def add_to(self, result: MetricResult, sums: Tensor, most: Tensor) -> None:
        passes = int(sums[-1])
        if not passes:
            return
        label, note = ("one-sided", "") if self.named else ("heuristic", FOUND)
        means = sums[:-1] / passes
        for head, (mean, high) in enumerate(zip(means.tolist(), most.tolist(), strict=True)):
            values = {"mean": mean, "max": high}
            reduced = {k: Value(v, passes, label, note=note) for k, v in values.items()}  # type: ignore[arg-type]
            result.add("attention_bound", f"{self.place}[{head}]", "tensor", **reduced)
        values = {"mean": float(means.max()), "max": float(most.max())}
        reduced = {k: Value(v, passes, label, note=note) for k, v in values.items()}  # type: ignore[arg-type]
        result.add("attention_bound", self.place, "group", **reduced)


def find_attention(model: nn.Module, choice: AttentionChoice | str | None) -> tuple[list[HeadBounds], dict[str, str]]:
    """Return what is to be watched, and why it is not where an attention module was seen.

    Raises:
        TypeError, ValueError: a choice that cannot be read, or that names nothing in the model.
    """
    if choice is None:
        return [], {}
    if choice == "auto":
        return _found(model)
    modules = dict(named_modules(model))
    bounds = []
    for pattern, names, parts in matching_modules(model, choice, "attention"):
        query, key, heads, scale = _checked_parts(pattern, parts)
        for name in names:
            for part in (query, key):
                if with_prefix(name, part) not in modules:
                    inside = [n for n, _ in modules[name].named_children()]
                    raise ValueError(f"attention: {name!r} has no module {part!r}; it has {listed(inside)}")
            full = with_prefix(name, query), with_prefix(name, key)
            flat = all(hasattr(modules[part], "out_features") or hasattr(modules[part], "nf") for part in full)
            bounds.append(HeadBounds(name, *full, heads, None, scale, named=True, flat=flat))
    return bounds, {}


def _checked_parts(pattern: str, parts: Any) -> tuple[str, str, int, float | None]:
    words = (
        f"attention: expected of {pattern!r} (queries, keys, heads), (queries, keys, heads, scale), (all three, heads) "
        f"or (all three, heads, scale), got {parts!r}"
    )
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
        raise ValueError(words)
    names = [part for part in parts if isinstance(part, str)]
    numbers = list(parts[len(names) :])
    fits = 1 <= len(names) <= 2 and list(parts[: len(names)]) == names and 1 <= len(numbers) <= 2
    if not fits or not is_integer(numbers[0]) or numbers[0] < 1:
        raise ValueError(words)
    scale = numbers[1] if len(numbers) == 2 else None
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale > 0):
        raise ValueError(words)
    return names[0], names[-1], numbers[0], None if scale is None else float(scale)


def _found(model: nn.Module) -> tuple[list[HeadBounds], dict[str, str]]:
    bounds, refused = [], {}
    for name, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            refused[name] = "nn.MultiheadAttention projects inside one function, where no hook sees queries and keys"
            continue
        children = {n: child for n, child in module.named_children() if not isinstance(child, nn.Identity)}
        pair = next((pair for pair in _PAIRS if all(part in children for part in pair)), None)
        fused = _FUSED.get(type(module).__name__)
        if pair is None and fused in children and children:
            assert fused is not None
            pair = (fused, fused)
        if pair is None:
            one = next((part for part in _ALL_IN_ONE if part in children), None)
            if one is not None:
                refused[name] = f"the order of what {one!r} returns is not known; name it if it is three equal parts"
            continue
        try:
            bounds.append(_bounds_of(name, module, children, pair))
        except ValueError as error:
            refused[name] = str(error)
    return bounds, refused


def _bounds_of(name: str, module: nn.Module, children: Mapping[str, nn.Module], pair: tuple[str, str]) -> HeadBounds:
    heads = _number(module, _HEADS) or _number(getattr(module, "config", None), _HEADS)
    if heads is None:
        parts = ", ".join(map(repr, dict.fromkeys(pair)))
        raise ValueError(f"it does not say how many heads it has; name it: attention={{{name!r}: ({parts}, <heads>)}}")
    normed = next((norms for norms in _NORMS if any(part in children for part in norms)), None)
    others = [part for part in children if "norm" in part and part not in (normed or ()) and set("qk") & set(part)]
    if others or (normed is not None and (pair[0] == pair[1] or not all(part in children for part in normed))):
        raise ValueError(f"queries or keys go through {listed(others or list(normed or ()))}; name what returns them")
    scale = next((getattr(module, key) for key in _SCALE if getattr(module, key, None) is not None), None)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise ValueError(f"its scale is a {type(scale).__name__}; name it with the number")
    if getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True):
        raise ValueError("it scales logits by a rule of its own; name it with the number")
    query, key = (with_prefix(name, part) for part in (normed or pair))
    return HeadBounds(name, query, key, heads, _number(module, _HEAD_DIM), scale, named=False, flat=normed is None)


def _number(owner: Any, keys: Sequence[str]) -> int | None:
    values = (getattr(owner, key, None) for key in keys)
    return next((int(value) for value in values if value is not None and is_integer(value) and value > 0), None)
