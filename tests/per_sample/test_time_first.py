"""Models that work or answer time first, [T, B, V] for an input [B, T], flattened or not, or return their loss alone:
the norms are those of samples, whatever the numbers of steps and samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from few import few
from per_sample_models import made
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms

B, C, V, N = 4, 6, 5, 11


class OwnLinear(nn.Linear):
    """A linear layer without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Model(nn.Module):
    """An embedding, two linear layers, a recurrent layer or attention between them."""

    def __init__(self, inside: str, outside: str, what: str, linear: type[nn.Linear], between: str) -> None:
        super().__init__()
        self.inside, self.outside, self.what = inside, outside, what
        self.embedding, self.first, self.last = nn.Embedding(N, C), linear(C, C), linear(C, V)
        self.between: nn.Module | None = None
        if between:
            self.between = nn.GRU(C, C) if between == "GRU" else nn.MultiheadAttention(C, 2)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        x = x.transpose(0, 1) if self.inside == "time" else x
        x = torch.tanh(self.first(x))
        if isinstance(self.between, nn.GRU):
            x = self.between(x)[0]
        elif self.between is not None:
            x = self.between(x, x, x)[0]
        x = self.last(x)
        x = x.transpose(0, 1) if self.inside != self.outside else x
        if self.what == "flat":
            return x.flatten(0, 1)
        return {"logits": x} if self.what == "dict" else loss_of(x).sum() if self.what == "loss" else x


def loss_of(x: Tensor) -> Tensor:
    return x * torch.cos(torch.arange(x.numel()) + 1.0).reshape(x.shape)


CASES = [
    *[("time", "time", what, nn.Linear, "") for what in ("plain", "flat", "loss")],
    ("batch", "time", "plain", OwnLinear, ""),
    ("time", "time", "plain", nn.Linear, "GRU"),
    *[
        (inside, outside, what, linear, "")
        for what in ("plain", "dict", "flat", "loss")
        for linear in (nn.Linear, OwnLinear)
        for inside, outside in (("time", "time"), ("batch", "time"), ("time", "batch"))
    ],
    *[("time", out, "plain", nn.Linear, between) for out in ("time", "batch") for between in ("GRU", "attention")],
]


@pytest.mark.parametrize("case", few(CASES, 4))
@pytest.mark.parametrize("length", [3, B, 2 * B])
def test_against_single_samples_of_the_same_pass(case: tuple[str, str, str, type[nn.Linear], str], length: int) -> None:
    model = made(lambda: Model(*case))
    _, outside, what, *_ = case
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            ids = torch.randint(N, (B, length))
            returned = model(ids)
            output = returned["logits"] if isinstance(returned, dict) else returned
            (output if what == "loss" else loss_of(output).sum()).backward()
            found = {name: metric.per_parameter[name] for name in metric.per_parameter}
            unproved = metric.unproved
            for name, row in exact(model, ids, outside).items():
                torch.testing.assert_close(found[name], row, rtol=1e-5, atol=1e-6)
            assert bool(unproved) == (what == "loss")


def exact(model: Model, ids: Tensor, outside: str) -> dict[str, Tensor]:
    what, model.what = model.what, "plain"
    each = loss_of(model(ids))
    model.what = what
    each = each.transpose(0, 1) if outside == "time" else each
    rows = [torch.autograd.grad(one.sum(), list(model.parameters()), retain_graph=True) for one in each]
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack([row[i].double().norm() for row in rows]) for i, name in enumerate(names)}


class Flattened(nn.Module):
    """A model whose rows are flattened before anything is trained, so that no view of the graph says how."""

    def __init__(self, *, loss: bool, drop: float = 0.0) -> None:
        super().__init__()
        self.linear, self.loss, self.drop = nn.Linear(C, V), loss, drop

    def forward(self, x: Tensor) -> Tensor:
        found = torch.tanh(F.dropout(self.linear(x.transpose(0, 1).flatten(0, 1)), self.drop, self.training))
        return found.square().sum() if self.loss else found


def test_rows_that_no_view_tells_are_known_by_what_a_sample_more_returns() -> None:
    model, x = made(lambda: Flattened(loss=False)), torch.randn(B, 3, C)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(x).square().sum().backward()
        found = metric.per_parameter["linear.weight"]
        assert not metric.unproved
    each = model(x).square().unflatten(0, (3, B)).sum((0, 2))
    rows = [torch.autograd.grad(one, model.linear.weight, retain_graph=True)[0].double().norm() for one in each]
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [Flattened(loss=True), Flattened(loss=False, drop=0.5)], ids=["loss", "dropout"])
def test_where_nothing_tells_there_is_no_number_and_the_reason(model: nn.Module) -> None:
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(torch.randn(B, 3, C)).square().sum().backward()
        assert metric.per_sample.isnan().all()
        assert "nothing shows whether the rows of a sample stand together or the samples take turns" in metric.broken
        assert "output='<module>'" in metric.broken


def test_the_remedy_works() -> None:
    """The module inside that is named returns the batch in a dimension of its own."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predictions, self.flat = nn.Identity(), Flattened(loss=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.predictions(self.flat(x).unflatten(0, (x.shape[1], x.shape[0]))).square().sum()  # type: ignore[no-any-return]

    model, x = made(Inside), torch.randn(B, 3, C)
    with PerSampleGradNorms(model, loss_reduction="sum", output="predictions") as metric:
        model(x).backward()
        found, unproved = metric.per_sample, metric.unproved
    each = model.flat(x).square().unflatten(0, (3, B)).sum((0, 2))
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in each]
    norms = [math.hypot(*(float(g.double().norm()) for g in row)) for row in rows]
    assert found.tolist() == pytest.approx(norms, rel=1e-5)
    assert not unproved


class Masked(nn.Module):
    """Attention with dropout on [T, B], which is given the padding as [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(N, C), nn.Linear(C, V)
        layer = nn.TransformerEncoderLayer(C, 2, 8)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding).mean(0))
        return y


def test_a_mask_that_has_the_samples_first() -> None:
    torch.manual_seed(0)
    model, padding = Masked(), torch.arange(7).expand(B, 7) > 4
    with PerSampleGradNorms(model, loss_reduction="mean", batch_dim=1) as norms:
        losses = F.cross_entropy(model(torch.randint(N, (7, B)), padding), torch.arange(B) % V, reduction="none")
        losses.mean().backward(retain_graph=True)
        found = norms.per_sample
        assert not norms.unproved
    for loss, norm in zip(losses, found, strict=True):
        each = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert float(norm) == pytest.approx(sum(float(g.square().sum()) for g in each) ** 0.5, rel=1e-5)
