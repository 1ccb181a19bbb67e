"""Public language models that predict the next token. Name -> a case with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers as hf
from public_cases import Build, Case, config_of, next_labels_of, text


def decoder(kind: str, *, experts: str = "", cached: bool = True, **changes: Any) -> Build:
    """A model for texts with padding."""

    def build() -> Case:
        model = hf.AutoModelForCausalLM.from_config(config_of(kind, **changes))
        model.config.use_cache = cached
        if experts:
            model.set_experts_implementation(experts)
        return Case(model, text(), next_labels_of)

    return build


def in_float32(build: Build) -> Build:
    """Where a model cannot be computed in float64, with a bound that allows for rounding on both sides."""
    return lambda: dataclasses.replace(build(), oracle=torch.float32, tolerance=5e-5)


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MIXTURE = {**GROUPED, **_EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
LATENT = {
    **_EXPERTS,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
STATES = {"state_size": 8}

DECODERS: dict[str, Build] = {
    "GPT-2": decoder("gpt2"),
    "GPT-Neo": decoder("gpt_neo", attention_types=[[["global", "local"], 1]]),
    "GPT-NeoX": decoder("gpt_neox"),
    "GPT-J": decoder("gptj", rotary_dim=4),
    "GPT-BigCode": decoder("gpt_bigcode"),
    "GPT": decoder("openai-gpt"),
    "CodeGen": decoder("codegen", rotary_dim=4),
    "OPT": decoder("opt", ffn_dim=48, word_embed_proj_dim=16),
    "BLOOM": decoder("bloom"),
    "MPT": decoder("mpt"),
    "Falcon": decoder("falcon"),
    "XGLM": in_float32(decoder("xglm", ffn_dim=48)),  # whose mask has the least float32
    "BioGPT": decoder("biogpt"),
    "Llama": decoder("llama", **GROUPED),
    "Llama, tied embeddings": decoder("llama", tie_word_embeddings=True, **GROUPED),
    "Mistral, sliding window": decoder("mistral", sliding_window=6, **GROUPED),
    "Qwen2": decoder("qwen2", **GROUPED),
    "Qwen3": decoder("qwen3", **GROUPED),
    "Gemma": decoder("gemma", **GROUPED),
    "Gemma 2": decoder("gemma2", **GROUPED),
    "Gemma 3": decoder("gemma3_text", **GROUPED),
    "Phi": decoder("phi"),
    "Phi-3": decoder("phi3", **GROUPED),
    "OLMo 2": decoder("olmo2", **GROUPED),
    "StableLM": decoder("stablelm", num_key_value_heads=4),
    "StarCoder2": decoder("starcoder2", **GROUPED),
    "Cohere": decoder("cohere", **GROUPED),
    "Granite": decoder("granite", **GROUPED),
    "SmolLM3": decoder("smollm3", **GROUPED),
    "GLM-4": decoder("glm4", **GROUPED),
    "Nemotron": decoder("nemotron", **GROUPED),
    "Persimmon": decoder("persimmon"),
    "Mixtral": decoder("mixtral", **MIXTURE),
    "Mixtral, grouped products": decoder("mixtral", experts="grouped_mm", **MIXTURE),
    "Mixtral, batched products": decoder("mixtral", experts="batched_mm", **MIXTURE),
    "Mixtral, experts one by one": decoder("mixtral", experts="eager", **MIXTURE),
    "Qwen2 MoE": decoder("qwen2_moe", **MIXTURE),
    "Qwen3 MoE": decoder("qwen3_moe", **MIXTURE),
    "Qwen3 MoE, experts one by one": decoder("qwen3_moe", experts="eager", **MIXTURE),
    "Granite MoE": decoder("granitemoe", **MIXTURE),
    "OLMoE": decoder("olmoe", **MIXTURE),
    "JetMoE": decoder("jetmoe", kv_channels=8, **MIXTURE),
    "GPT-OSS": decoder("gpt_oss", **MIXTURE),
    "DeepSeek V3": decoder("deepseek_v3", **LATENT),
    "Mamba": decoder("mamba", **STATES),
    "Mamba 2": decoder("mamba2", num_heads=8, head_dim=8, n_groups=2, chunk_size=8, **STATES),
    "Falcon Mamba": decoder("falcon_mamba", **STATES),
    "RWKV": decoder("rwkv"),
    "RecurrentGemma": decoder("recurrent_gemma", cached=False, num_key_value_heads=1),
    "Jamba": decoder("jamba", attn_layer_offset=1, attn_layer_period=2, expert_layer_period=2, **GROUPED, **_EXPERTS),
    "Bamba": decoder(
        "bamba", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, attn_layer_indices=[1], **GROUPED
    ),
    "Qwen3-Next": decoder(
        "qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **MIXTURE,
    ),
    "LFM2": decoder("lfm2", layer_types=["conv", "full_attention"], **GROUPED),
    "xLSTM": decoder("xlstm", cached=False, num_heads=4),
    "CTRL": decoder("ctrl", dff=48),
    "OLMo": decoder("olmo", **GROUPED),
    "Cohere 2": decoder("cohere2", sliding_window=6, **GROUPED),
    "Llama 4": decoder(
        "llama4_text", intermediate_size_mlp=48, interleave_moe_layer_step=1, attention_chunk_size=8, **MIXTURE
    ),
    "DeepSeek V2": decoder("deepseek_v2", **LATENT),
    "GLM-4 MoE": decoder("glm4_moe", n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, **MIXTURE),
    "MiniMax": decoder("minimax", layer_types=["linear_attention", "full_attention"], block_size=4, **MIXTURE),
    "Zamba 2": decoder(
        "zamba2",
        layers_block_type=["mamba", "hybrid"],
        n_mamba_heads=8,
        mamba_d_state=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=8,
        num_mem_blocks=1,
        adapter_rank=4,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "Falcon-H1": decoder(
        "falcon_h1",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        mamba_n_groups=1,
        **GROUPED,
    ),
    "Granite 4, hybrid": decoder(
        "granitemoehybrid",
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        shared_intermediate_size=16,
        **MIXTURE,
    ),
}
