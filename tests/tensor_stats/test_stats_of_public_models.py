"""Attention bounds and routers that are found by name in public architectures: against what these multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lipcore import TensorStats

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
#: What their configurations call otherwise.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},  # norms of queries and keys, per head
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},  # norms of all heads together
    "gemma2": {},
    "gemma3_text": {},
    "qwen2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granite": {},
    "cohere": {},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "phi": {},
    "smollm3": {},
    "glm4": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    "vit": {"image_size": 8, "patch_size": 4},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(kind: str, attention: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | KINDS[kind])
    headless = kind in ("bert", "distilbert", "vit")
    kinds = transformers.AutoModel if headless else transformers.AutoModelForCausalLM
    model = kinds.from_config(config, attn_implementation=attention).eval()
    if kind == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 8, 8)}
    return model, {"input_ids": torch.randint(1, 60, (2, 7))}


@pytest.mark.ci
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_that_of_what_is_multiplied(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    exact: list[Tensor] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        exact.append((q.norm(dim=-1).amax((0, 2)) * k.norm(dim=-1).amax((0, 2)) * scaling).detach())
        weights = (q @ k.mT * scaling).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    transformers.AttentionInterface.register("lipcore_test", attend)
    model, inputs = model_of(kind, "lipcore_test")
    wishes = {"attention": "auto", "router": "auto", "parameters": False, "gradients": False}
    with TensorStats(model, every_steps=1, **wishes) as stats:
        model(**inputs)[0].sum().backward()
        stats.update()
    result = stats.compute()
    assert "attention_unseen" not in result.details
    modules = [place for place in result.attention_bound if result.attention_bound.level(place) == "group"]
    assert len(modules) == len(exact) == 2
    for place, bounds in zip(modules, exact, strict=True):
        for head, bound in enumerate(bounds.tolist()):
            assert result.attention_bound[f"{place}[{head}]"].max.value == pytest.approx(bound, rel=1e-5)
    assert ("router_share" in result) == (kind in ("mixtral", "qwen3_moe"))
    assert "not_read" not in result.details


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["gpt_neox", "phi3"])
def test_a_projection_of_unknown_order_is_not_measured(kind: str) -> None:
    KINDS.setdefault(kind, {})
    model, _ = model_of(kind, "eager")
    stats = TensorStats(model, attention="auto")
    assert repr(stats.plan()).count("not measured: the order of what") == 2
    stats.close()
