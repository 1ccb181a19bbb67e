"""Adapters of the peft library on frozen language models. Name -> a case with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import transformers as hf
from public_cases import Build, Case, config_of, labels_of, next_labels_of, text
from public_decoders import GROUPED, MIXTURE
from torch import nn


def adapted(kind: str, adapter: Callable[[], peft.PeftConfig], *, in_front: bool = False, **changes: Any) -> Build:
    """A frozen language model with an adapter, whose weights are random so that all of them have gradients. Tokens that
    an adapter puts in front of a text leave the text's first label a term of the loss."""

    def build() -> Case:
        model = peft.get_peft_model(hf.AutoModelForCausalLM.from_config(config_of(kind, **changes)), adapter())
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        return Case(model, text(), labels_of if in_front else next_labels_of)

    return build


def lora(**options: Any) -> peft.LoraConfig:
    """Return low-rank adapters."""
    return peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)


_TASK = {"task_type": "CAUSAL_LM"}
_QUERIES = {"target_modules": ["q_proj", "v_proj"]}

ADAPTERS: dict[str, Build] = {
    "LoRA on Llama": adapted("llama", lambda: lora(**_QUERIES), **GROUPED),
    "LoRA on GPT-2": adapted("gpt2", lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "LoRA on embeddings": adapted("llama", lambda: lora(target_modules=["q_proj", "embed_tokens"]), **GROUPED),
    "LoRA on experts": adapted(
        "mixtral",
        lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
        **MIXTURE,
    ),
    "LoRA and the whole head": adapted(
        "llama", lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), **GROUPED
    ),
    "DoRA on Llama": adapted("llama", lambda: lora(use_dora=True, **_QUERIES), **GROUPED),
    "IA3 on Llama": adapted(
        "llama",
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **_TASK),
        **GROUPED,
    ),
    "OFT on Llama": adapted("llama", lambda: peft.OFTConfig(r=0, oft_block_size=4, **_QUERIES, **_TASK), **GROUPED),
    "LoKr on Llama": adapted("llama", lambda: peft.LoKrConfig(r=4, **_QUERIES, **_TASK), **GROUPED),
    "prompt tuning": adapted(
        "llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **_TASK), in_front=True, **GROUPED
    ),
    "prefix tuning": adapted("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **_TASK), **GROUPED),
    "p-tuning": adapted(
        "llama",
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **_TASK),
        in_front=True,
        **GROUPED,
    ),
}
