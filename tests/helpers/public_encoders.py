"""Public encoders of text, and encoders with decoders. Name -> a case with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from public_cases import CLASSES, IGNORED, Build, Case, Inputs, config_of, labels_of, rows_of, text
from torch import Tensor, nn
from torch.nn import functional as F


def masked(kind: str, **changes: Any) -> Build:
    """An encoder that predicts masked tokens."""

    def build() -> Case:
        batch = text()
        batch["labels"][:, ::3] = IGNORED
        return Case(hf.AutoModelForMaskedLM.from_config(config_of(kind, **changes)), batch, labels_of)

    return build


def classifier(kind: str, labels: int = CLASSES, **changes: Any) -> Build:
    """An encoder that sorts texts into classes, or gives each a number."""

    def build() -> Case:
        model = hf.AutoModelForSequenceClassification.from_config(config_of(kind, num_labels=labels, **changes))
        batch = text()
        size = len(batch["labels"])
        batch["labels"] = torch.randint(labels, (size,)) if labels > 1 else torch.randn(size)
        return Case(model, batch, rows_of)

    return build


def translator(kind: str, *, padded: bool = True, **changes: Any) -> Build:
    """An encoder and a decoder; both texts have padding."""

    def build() -> Case:
        config = config_of(kind, decoder_start_token_id=0, **changes)
        batch = text(padded=padded) | {"labels": text(7)["labels"]}
        return Case(hf.AutoModelForSeq2SeqLM.from_config(config), batch, labels_of)

    return build


class Pooled(nn.Module):
    """Sentence embeddings: the mean over a text's tokens, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = hf.BertModel(config_of("bert"), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def sentence_embeddings() -> Case:
    """Embeddings that are pulled to given directions."""

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        found = model(batch["input_ids"], batch["attention_mask"])
        return (1 - (found * batch["target"]).sum(-1)).mean()

    batch = text()
    del batch["labels"]
    return Case(Pooled(), batch | {"target": torch.randn(len(batch["input_ids"]), 32)}, rows_of, loss)


STACKS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}

ENCODERS: dict[str, Build] = {
    "BERT, masked tokens": masked("bert"),
    "BERT, classes": classifier("bert"),
    "BERT, regression": classifier("bert", labels=1),
    "RoBERTa": masked("roberta"),
    "ModernBERT": masked("modernbert", cls_token_id=1, sep_token_id=2),
    "MPNet": masked("mpnet"),
    "ESM": masked("esm", mask_token_id=3),
    "RoFormer": masked("roformer", embedding_size=16),
    "ConvBERT": masked("convbert", embedding_size=16),
    "MobileBERT": masked("mobilebert", embedding_size=16, intra_bottleneck_size=16),
    "FNet": masked("fnet"),
    "SqueezeBERT": classifier("squeezebert", embedding_size=32),
    "DeBERTa V2": classifier(
        "deberta-v2", relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"]
    ),
    "DistilBERT": classifier("distilbert"),
    "ELECTRA": classifier("electra", embedding_size=16),
    "ALBERT": classifier("albert", embedding_size=16),
    "Funnel": classifier(
        "funnel", d_head=8, d_inner=48, block_sizes=[1, 1], num_decoder_layers=1, num_hidden_layers=None
    ),
    "Longformer": classifier("longformer", attention_window=4),
    "BigBird": classifier("big_bird", attention_type="original_full"),
    "Nystromformer": classifier("nystromformer", num_landmarks=4, segment_means_seq_len=4),
    "sentence embeddings": sentence_embeddings,
    "T5": translator("t5", d_kv=8, d_ff=48),
    "LongT5": translator("longt5", d_kv=8, d_ff=48, local_radius=3),
    "UMT5": translator("umt5", d_kv=8, d_ff=48),
    "BART": translator("bart", **STACKS),
    "mBART": translator("mbart", **STACKS),
    "Pegasus": translator("pegasus", **STACKS),
    "Marian": translator("marian", **STACKS),
    "M2M100": translator("m2m_100", **STACKS),
    "Blenderbot": translator("blenderbot", **STACKS),
    "PLBART": translator("plbart", **STACKS),
    "LED": translator("led", padded=False, attention_window=4, **STACKS),
    "Switch Transformers": translator(
        "switch_transformers",
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_experts=4,
        expert_capacity=64,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
}
