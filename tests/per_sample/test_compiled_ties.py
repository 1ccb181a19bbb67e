"""Parameters that are used several times in compiled regions: their uses are joined, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from per_sample_models import Transformer, assert_equal, made, sum_loss, weights
from per_sample_oracle import assert_norms, norms_sq, samples_of
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def tokens(size: int) -> Tensor:
    return torch.randint(11, (size, 5), generator=torch.Generator().manual_seed(size))


class OneEmbedding(nn.Module):
    """As in T5: one embedding module at three places of the model, and tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(11, 6)
        self.encoder = nn.ModuleDict({"tokens": self.shared, "layer": nn.Linear(6, 6)})
        self.decoder = nn.ModuleDict({"tokens": self.shared, "layer": nn.Linear(6, 6)})
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        read = self.encoder["layer"](self.encoder["tokens"](ids)).tanh().mean(1, keepdim=True)
        out: Tensor = self.head(self.decoder["layer"](self.decoder["tokens"](ids.flip(1)) + read).tanh())
        return out


class OneWeight(nn.Module):
    """Two linear layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.embed(ids)).tanh())
        return out


class PartlyCompiled(nn.Module):
    """The head is in a compiled region, the embedding is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 11, bias=False))
        inner[2].weight = self.embed.weight
        self.rest = inner

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.rest(self.embed(ids))
        return out


TIED: dict[str, Callable[[], nn.Module]] = {
    "transformer": Transformer,
    "one embedding": OneEmbedding,
    "one weight": OneWeight,
}
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.ci)]


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["one embedding", "one weight", pytest.param("transformer", marks=pytest.mark.ci)])
def test_the_uses_are_joined(name: str, backend: str, counters: Any) -> None:
    inner = made(TIED[name])
    model = torch.compile(inner, fullgraph=True, backend=backend)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size in (4, 3):
            ids = tokens(size)
            sum_loss(model(ids)).backward()
            assert_norms(metric, norms_sq(inner, samples_of((ids,), size), sum_loss))
            # With sizes that are symbols torch allows no second backward pass, which is said.
            assert not metric.unproved or size == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_is_the_same_bits(backend: str) -> None:
    found = []
    for watched in (False, True):
        torch._dynamo.reset()
        inner = made(OneEmbedding)
        model = torch.compile(inner, fullgraph=True, backend=backend)
        optimizer = torch.optim.AdamW(inner.parameters(), 1e-2)
        metric = PerSampleGradNorms(model, loss_reduction="sum") if watched else None
        for _ in range(3):
            sum_loss(model(tokens(4))).backward()
            optimizer.step()
            optimizer.zero_grad()
        if metric is not None:
            metric.close()
        found.append(weights(inner))
    assert_equal(*found)


def test_a_region_and_an_eager_part() -> None:
    model = made(PartlyCompiled)
    expected = norms_sq(model, samples_of((tokens(4),), 4), sum_loss)
    model.rest = torch.compile(model.rest, fullgraph=True, backend="aot_eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(tokens(4))).backward()
        found = {name.replace("_orig_mod.", ""): norms for name, norms in metric.per_parameter.items()}
        assert found.keys() == expected.keys()
        for name, norms in found.items():
            torch.testing.assert_close(norms.square(), expected[name], rtol=1e-5, atol=0.0)


def test_two_backward_passes_of_two_forward_passes() -> None:
    inner = made(OneEmbedding)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    first, second = tokens(4), tokens(4).flip(0)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        outputs = [model(first), model(second)]
        for ids, output in zip((second, first), reversed(outputs), strict=True):
            sum_loss(output).backward()
            assert_norms(metric, norms_sq(inner, samples_of((ids,), 4), sum_loss))


def test_gradients_that_are_not_the_trainings() -> None:
    inner = made(OneEmbedding)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    ids = tokens(4)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(ids)).backward()
        torch.autograd.grad(sum_loss(model(ids)), list(inner.parameters()))
        assert metric.per_sample.isnan().all()
        sum_loss(model(ids)).backward()
        assert_norms(metric, norms_sq(inner, samples_of((ids,), 4), sum_loss))


# ---- models of the transformers library


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


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in LIBRARY), ("llama", "inductor"), ("t5", "inductor")]
)
def test_models_of_the_transformers_library(name: str, backend: str, counters: Any) -> None:
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
    assert not counters["graph_break"]
