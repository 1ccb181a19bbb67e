"""Public architectures from the transformers library: what a case of them is, and batches of text and images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Any]
IGNORED = -100  # no term of a loss has this label
VOCABULARY, SAMPLES, LENGTH, CLASSES = 97, 3, 11, 3

#: What most configurations know under these names, whatever they call it themselves.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of_output(model: nn.Module, batch: Inputs) -> Tensor:
    """Return the loss that the model computes itself."""
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class Case:
    """A model with random weights and a batch.

    Attributes:
        model: in training mode, without dropout.
        batch: keywords for the model, and whatever else the loss needs; samples are at dimension 0.
        terms: how many terms the loss of a batch is the mean of.
        loss: from the model and a batch.
        oracle: the dtype in which single samples are differentiated.
        tolerance: of norms, relative to the oracle's.
    """

    model: nn.Module
    batch: Inputs
    terms: Callable[[Inputs], int]
    loss: Callable[[nn.Module, Inputs], Tensor] = of_output
    oracle: torch.dtype = torch.float64
    tolerance: float = 1e-5

    def samples(self) -> list[Inputs]:
        """Return the batch of every sample alone; a tensor may have a block of rows of each."""
        size = rows_of(self.batch)
        split = {k: x.chunk(size) if isinstance(x, Tensor) else [x] * size for k, x in self.batch.items()}
        return [{k: each[i] for k, each in split.items()} for i in range(size)]

    def norms_sq(self) -> dict[str, Tensor]:
        """Return per parameter that the loss depends on the squared norms of the gradients of every sample's own terms,
        float64 [B]."""
        exact = copy.deepcopy(self.model).to(self.oracle)
        if hasattr(exact, "set_experts_implementation"):
            exact.set_experts_implementation("eager")  # the only one that every dtype has
        named = {name: p for name, p in exact.named_parameters() if p.requires_grad}
        rows: dict[str, list[Tensor]] = {name: [] for name in named}
        used = set()
        for sample in self.samples():
            sample = {k: x.to(self.oracle) if _is_float(x) else x for k, x in sample.items()}
            total = self.loss(exact, sample) * self.terms(sample)
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                used |= set() if grad is None else {name}
                zero = torch.zeros((), dtype=torch.float64)
                rows[name].append(zero if grad is None else grad.to_dense().double().square().sum())
        return {name: torch.stack(each) for name, each in rows.items() if name in used}


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return per parameter the largest error of a norm, relative to it and, where it is zero but for rounding, to the
    model's largest.

    Args:
        found: norms.
        expected: their squares.
    """
    largest = max(float(row.max()) for row in expected.values()) ** 0.5
    return {k: float(((found[k] - row.sqrt()).abs() / (row.sqrt() + largest)).max()) for k, row in expected.items()}


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def labels_of(batch: Inputs) -> int:
    """Return the number of labels that are not ignored."""
    return int((batch["labels"] != IGNORED).sum())


def next_labels_of(batch: Inputs) -> int:
    """Return that number for a model that predicts the next token."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def rows_of(batch: Inputs) -> int:
    """Return the number of samples."""
    return next(len(x) for x in batch.values() if isinstance(x, Tensor))


def text(length: int = LENGTH, *, padded: bool = True) -> Inputs:
    """Return token ids, of which the later samples have fewer, and labels that are the ids."""
    ids = torch.randint(3, VOCABULARY, (SAMPLES, length))
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(SAMPLES if padded else 0):
        cut = length - 2 * i
        mask[i, cut:], ids[i, cut:], labels[i, cut:] = 0, 0, IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def images(size: int = 32, channels: int = 3) -> Inputs:
    """Return images with a class each."""
    return {"pixel_values": torch.randn(SAMPLES, channels, size, size), "labels": torch.randint(CLASSES, (SAMPLES,))}


def without_dropout(config: Any) -> Any:
    """Set a configuration's dropout of every kind to zero, in nested ones too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    return config


def config_of(kind: str, **changes: Any) -> Any:
    """Return a small configuration of a kind that the library knows; what is None is left to it."""
    given = {name: value for name, value in (SIZES | changes).items() if value is not None}
    return without_dropout(hf.AutoConfig.for_model(kind, **given))


Build = Callable[[], Case]
