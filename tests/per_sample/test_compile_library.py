"""Models of the transformers library in compiled regions, tied weights included; no graph breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_sample_models import sum_loss
from torch import Tensor

from lipcore import PerSampleGradNorms

pytestmark = [
    pytest.mark.ci,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


def gpt2() -> tuple[Any, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=16, **dropout)
    return GPT2LMHeadModel(config), {"broadcast": ["transformer.wpe"]}


def llama() -> tuple[Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, tie_word_embeddings=True, **sizes)), {}


def roberta() -> tuple[Any, dict[str, Any]]:
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=31, max_position_embeddings=16, **sizes, **dropout)), {}


def t5() -> tuple[Any, dict[str, Any]]:
    """Its relative positions meet no batch, and are left out."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=31, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config), {"on_unsupported": "skip"}


def whisper() -> tuple[Any, dict[str, Any]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    heads = {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=31, max_source_positions=8, max_target_positions=16, **sizes, **heads, **tokens)
    return WhisperForConditionalGeneration(config), {"on_unsupported": "skip"}


LIBRARY = {"gpt2": gpt2, "llama": llama, "roberta": roberta, "t5": t5, "whisper": whisper}


def called(name: str, model: Any, ids: Tensor) -> Tensor:
    if name == "whisper":
        sound = torch.sin(torch.arange(8 * 16).reshape(1, 8, 16) * (1.0 + ids[:, :1, None]))
        return model(input_features=sound, decoder_input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    more = {"decoder_input_ids": ids.flip(1)} if name == "t5" else {}
    more |= {} if name == "roberta" else {"use_cache": False}
    return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in LIBRARY), ("llama", "inductor"), ("t5", "inductor")]
)
def test_models_of_the_transformers_library(name: str, backend: str, fresh_dynamo: Any) -> None:
    pytest.importorskip("transformers", reason="models of the transformers library: pip install 'lipcore[models]'")
    torch.manual_seed(0)
    inner, options = LIBRARY[name]()
    inner.train()
    ids = torch.randint(3, 31, (3, 7))
    expected: dict[str, list[Tensor]] = {}
    for sample in range(3):
        inner.zero_grad()
        sum_loss(called(name, inner, ids[sample : sample + 1])).backward()
        for key, parameter in inner.named_parameters():
            if parameter.grad is not None:
                expected.setdefault(key, []).append(parameter.grad.double().square().sum())
    inner.zero_grad()
    model = torch.compile(inner, fullgraph=True, backend=backend)
    with PerSampleGradNorms(model, loss_reduction="sum", **options) as metric:
        sum_loss(called(name, model, ids)).backward()
        found = metric.per_parameter
        largest = max(float(torch.stack(row).max()) for row in expected.values())
        for key, norms in found.items():
            # Gradients of nothing but rounding: the biases of keys.
            torch.testing.assert_close(norms.square(), torch.stack(expected[key]), rtol=1e-4, atol=1e-9 * largest)
        left_out = {key.rpartition(".")[0].rpartition(".")[2] for key in expected.keys() - found.keys()}
        assert left_out <= {"relative_attention_bias", "embed_positions"}  # of positions, which meet no batch
        assert not metric.unproved
    assert not fresh_dynamo["graph_break"]
