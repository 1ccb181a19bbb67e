"""Models that put the features of pictures into texts (LLaVA): pictures belong to samples by where the texts have a
place for them, whatever the first batch was like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from few import few
from per_sample_models import made
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms

B, T, C, PATCHES, WORDS = 4, 8, 6, 2, 9
PLACE = WORDS  # the word in whose place a patch's features come


class OwnLinear(nn.Linear):
    """A linear layer without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def by_masked_scatter(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    return x.masked_scatter(mask[..., None].expand_as(x), features)


def by_mask(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    found = x.clone()
    found[mask] = features.flatten(0, 1)
    return found


def by_numbers(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    found = x.clone()
    found[mask.nonzero(as_tuple=True)] = features.flatten(0, 1)
    return found


def by_where(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Rows are taken for all places, and used in those of patches."""
    if not len(features):
        return x
    numbers = (mask.flatten().cumsum(0) - 1).clamp(min=0)
    return torch.where(mask[..., None], features.flatten(0, 1)[numbers].view_as(x), x)


Put = Callable[[Tensor, Tensor, Tensor], Tensor]


class Reader(nn.Module):
    def __init__(self, put: Put, linear: type[nn.Linear], beside: str = "") -> None:
        super().__init__()
        self.put, self.beside = put, beside
        self.words, self.patches = nn.Embedding(WORDS, C), nn.Conv2d(3, C, 2, 2)
        self.seen, self.joined, self.body, self.head = linear(C, C), linear(C, C), linear(C, C), nn.Linear(C, WORDS)
        self.shift = nn.Parameter(torch.randn(C))

    def forward(self, ids: Tensor, pictures: Tensor) -> Any:
        features = self.patches(pictures).flatten(2).transpose(1, 2)[:, :PATCHES]
        features = self.joined(torch.tanh(self.seen(features) + self.shift))
        x = self.put(self.words(ids.clamp(max=WORDS - 1)), ids == PLACE, features)
        logits = self.head(torch.tanh(self.body(x)))
        if not self.beside:
            return logits
        pooled = features.mean(1)
        return {"logits": logits, "beside": pooled if self.beside == "pooled" else features.unbind()}


def batch(counts: list[int]) -> tuple[Tensor, Tensor]:
    """Texts with so many pictures each."""
    ids = torch.randint(WORDS, (B, T))
    for row, count in zip(ids, counts, strict=True):
        row[torch.randperm(T)[: count * PATCHES]] = PLACE
    return ids, torch.randn(sum(counts), 3, 4, 4)


def weights(shape: torch.Size) -> Tensor:
    return torch.cos(torch.arange(shape.numel()) + 1.0).reshape(shape)


def exact(model: Reader, ids: Tensor, pictures: Tensor, counts: list[int]) -> dict[str, Tensor]:
    """Norms of single samples with their own pictures, float64."""
    double, given = copy.deepcopy(model).double(), weights(torch.Size((B, T, WORDS))).double()
    rows = []
    for i, own in enumerate(pictures.double().split(counts)):
        returned = double(ids[i : i + 1], own)
        loss = ((returned["logits"] if model.beside else returned) * given[i]).sum()
        gradients = torch.autograd.grad(loss, list(double.parameters()), allow_unused=True)
        rows.append([0.0 if g is None else float(g.norm()) for g in gradients])
    columns = zip(*rows, strict=True)
    return dict(zip((name for name, _ in model.named_parameters()), map(torch.tensor, columns), strict=True))


BATCHES = {
    "one each at first": [[1, 1, 1, 1], [2, 0, 1, 1], [0, 2, 2, 0], [1, 1, 1, 1]],
    "two at the end": [[0, 1, 1, 2], [2, 0, 1, 1], [1, 1, 1, 1]],
    "all in one": [[0, 0, 0, 4], [1, 1, 1, 1], [4, 0, 0, 0]],
    "other numbers": [[1, 2, 2, 1], [2, 0, 1, 0], [1, 1, 1, 1], [3, 1, 2, 2]],
    "one each always": [[1, 1, 1, 1]] * 3,
    "none at first": [[0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 1, 1]],
}
LINEARS: tuple[type[nn.Linear], ...] = (nn.Linear, OwnLinear)
PUTS: dict[str, Put] = {"masked_scatter": by_masked_scatter, "mask": by_mask, "numbers": by_numbers}
CASES = [
    *[("masked_scatter", nn.Linear, name) for name in BATCHES],
    ("mask", nn.Linear, "one each at first"),
    *[(put, linear, name) for put in PUTS for linear in LINEARS for name in BATCHES],
]


def passes(model: nn.Module, name: str) -> Iterator[dict[str, Tensor]]:
    """Make a backward pass for each of some batches, and give what its norms are."""
    for counts in BATCHES[name]:
        ids, pictures = batch(counts)
        expected = exact(model, ids, pictures, counts)
        output = model(ids, pictures)
        (output * weights(output.shape)).sum().backward()
        yield expected


@pytest.mark.parametrize("case", few(CASES, 3), ids=str)
def test_norms_in_every_pass(case: tuple[str, type[nn.Linear], str]) -> None:
    put, linear, name = case
    model = made(lambda: Reader(PUTS[put], linear))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for expected in passes(model, name):
            found = metric.per_parameter
            for parameter, row in expected.items():
                torch.testing.assert_close(found[parameter], row.double(), rtol=1e-4, atol=1e-6)
            squares = torch.stack(list(expected.values())).double().square()
            torch.testing.assert_close(metric.per_sample, squares.sum(0).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", few(BATCHES, 1))
def test_rows_that_are_taken_for_other_places_too_have_the_right_norm_or_none(name: str) -> None:
    """Which of them have no gradient is known behind the backward pass alone."""
    model = made(lambda: Reader(by_where, nn.Linear))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for expected in passes(model, name):
            for parameter, row in expected.items():
                found = metric.per_parameter[parameter]
                assert torch.allclose(found[~found.isnan()], row.double()[~found.isnan()], rtol=1e-4, atol=1e-6)
                assert not found.isnan().any() or parameter in metric.per_parameter.reasons


@pytest.mark.parametrize("name", few(["all in one", "one each at first", "two at the end", "other numbers"], 1))
@pytest.mark.parametrize("beside", few(["list", "pooled"], 1))
def test_features_that_are_returned_beside_the_logits(name: str, beside: str) -> None:
    model = made(lambda: Reader(by_masked_scatter, nn.Linear, beside))
    with PerSampleGradNorms(model, loss_reduction="sum", output="logits") as metric:
        for counts in BATCHES[name]:
            ids, pictures = batch(counts)
            expected = exact(model, ids, pictures, counts)
            output = model(ids, pictures)["logits"]
            (output * weights(output.shape)).sum().backward()
            for parameter, row in expected.items():
                torch.testing.assert_close(metric.per_parameter[parameter], row.double(), rtol=1e-4, atol=1e-6)


def test_pooled_features_in_another_order_are_refused_with_the_remedy() -> None:
    model = made(lambda: Reader(by_masked_scatter, nn.Linear, "pooled"))
    with pytest.warns(RuntimeWarning, match="beside what the loss is made of .*output="):
        metric = PerSampleGradNorms(model, loss_reduction="sum")
        output = model(*batch([0, 1, 1, 2]))["logits"]
        (output * weights(output.shape)).sum().backward()
    with pytest.raises(ValueError, match="beside what the loss is made of .*output="):
        _ = metric.per_sample
    metric.close()
