"""The loss as transformers' Trainer scales it, against float64, one sample at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore import PerSampleGradNorms

pytestmark = pytest.mark.ci
transformers = pytest.importorskip("transformers")

VOCABULARY = 31
SIZES: dict[str, dict[str, Any]] = {
    "Llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0}
    | {"attn_pdrop": 0},
}
HEADS = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}
BROADCAST = {"Llama": [], "GPT2": ["transformer.wpe"]}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **SIZES[kind])
    return getattr(transformers, HEADS[kind])(config)


def documents(count: int = 6, length: int = 9) -> list[dict[str, Tensor]]:
    """Documents whose targets end at different tokens."""
    ids = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for i in range(count):
        labels[i, 2 + i :] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def truth(model: nn.Module, batch: dict[str, Tensor], measured: set[str], smoothing: float = 0.0) -> Tensor:
    """Norms, over the measured parameters, of each document's summed loss over its targets."""
    exact, norms = copy.deepcopy(model).double(), []
    parameters = [p for name, p in exact.named_parameters() if name in measured]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        logits = exact(input_ids=ids[None]).logits[0, :-1]
        loss = nnf.cross_entropy(logits, labels[1:], reduction="sum", label_smoothing=smoothing)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm())
    return torch.stack(norms)


def items_of(_: Any, keywords: dict[str, Any]) -> Any:
    return keywords["num_items_in_batch"]


WAYS: dict[str, dict[str, Any]] = {
    "auto": {"loss_reduction": "auto"},
    "keyword": {"loss_reduction": "mean", "loss_terms": "num_items_in_batch"},
    "function": {"loss_reduction": "mean", "loss_terms": items_of},
}


@pytest.mark.parametrize("items", [40, torch.tensor(40)], ids=["number", "tensor"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SIZES)
def test_the_items_of_all_micro_batches(kind: str, way: str, items: Any) -> None:
    model, rows = made(kind), documents()
    with PerSampleGradNorms(model, on_unsupported="skip", broadcast=BROADCAST[kind], **WAYS[way]) as norms:
        for part in (rows[:2], rows[2:]):
            batch = joined(part)
            model(**batch, num_items_in_batch=items).loss.backward()
            assert torch.allclose(norms.per_sample, truth(model, batch, set(norms.coverage().covered)), rtol=1e-4)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_mean_over_the_tokens_of_each_micro_batch(as_tuple: bool) -> None:
    model, rows = made("Llama"), documents()
    with PerSampleGradNorms(model, on_unsupported="skip", loss_reduction="auto") as norms:
        for part in (rows[:2], rows[2:]):
            batch = joined(part)
            output = model(**batch, return_dict=not as_tuple)
            (output[0] / 2).backward()
            assert torch.allclose(norms.per_sample, truth(model, batch, set(norms.coverage().covered)), rtol=1e-4)


class Compared:
    """What every training step of a Trainer has brought, beside what it should have."""

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        self.found: list[Tensor] = []
        self.expected: list[Tensor] = []
        self.reasons: list[str] = []

    def trainer(self, model: nn.Module, norms: PerSampleGradNorms, folder: Path, **more: Any) -> Any:
        compared = self

        class Trainer(transformers.Trainer):
            def training_step(self, model: nn.Module, inputs: Any, *others: Any, **keywords: Any) -> Tensor:
                measured = set(norms.coverage().covered)
                compared.expected.append(truth(model, inputs, measured, compared.smoothing))
                loss = super().training_step(model, inputs, *others, **keywords)
                compared.found.append(norms.per_sample)
                compared.reasons.append(norms.broken)
                return loss

        function = more.pop("compute_loss_func", None)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **more,
        )
        return Trainer(model, arguments, train_dataset=documents(12, 14), compute_loss_func=function)

    def check(self) -> None:
        assert len(self.found) == 6
        for found, expected in zip(self.found, self.expected, strict=True):
            assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_with_gradient_accumulation(way: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, compared = made("Llama"), Compared()
    with PerSampleGradNorms(model, on_unsupported="skip", **WAYS[way]) as norms:
        compared.trainer(model, norms, tmp_path).train()
    compared.check()


def test_a_trainer_that_smooths_labels_outside_the_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers.trainer_pt_utils import LabelSmoother

    model, compared = made("Llama"), Compared(0.1)
    with PerSampleGradNorms(model, on_unsupported="skip", loss_reduction="auto") as norms:
        compared.trainer(model, norms, tmp_path, label_smoothing_factor=0.1).train()
        assert all("call set_loss(loss) before loss.backward()" in reason for reason in compared.reasons)

    model, compared = made("Llama"), Compared(0.1)
    with PerSampleGradNorms(model, on_unsupported="skip", **WAYS["keyword"]) as norms:
        compared.trainer(model, norms, tmp_path, label_smoothing_factor=0.1).train()
    compared.check()
    smoother = LabelSmoother(0.1)

    model, compared = made("Llama"), Compared(0.1)
    with PerSampleGradNorms(model, on_unsupported="skip", loss_reduction="auto") as norms:

        def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            loss = smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
            norms.set_loss(loss)
            return loss

        compared.trainer(model, norms, tmp_path, compute_loss_func=loss_of).train()
    compared.check()
