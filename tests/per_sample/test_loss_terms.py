"""The number of loss terms, from what the model is called with."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore import Monitor, PerSampleGradNorms


class Trained(nn.Module):
    """A model that returns its loss, as a trainer's do: summed over targets, over the items of all micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        logits = self.body(x)
        loss = nnf.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss / (len(x) if num_items_in_batch is None else num_items_in_batch), "logits": logits}


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, -100, 2, 2])
PARTS = [(X[:2], Y[:2]), (X[2:], Y[2:])]
ITEMS = 5


def made() -> Trained:
    torch.manual_seed(0)
    return Trained()


def truth(model: Trained, x: Tensor, y: Tensor) -> Tensor:
    norms = []
    for i in range(len(x)):
        loss = nnf.cross_entropy(model.body(x[i : i + 1]), y[i : i + 1], reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.double().flatten() for g in grads]).norm())
    return torch.stack(norms)


TERMS: dict[str, Any] = {
    "keyword": "num_items_in_batch",
    "function": lambda arguments, keywords: keywords["num_items_in_batch"],
    "arguments": lambda arguments, keywords: 5 * torch.ones(()) if len(arguments) else None,
}


@pytest.mark.parametrize("items", [ITEMS, torch.tensor(ITEMS)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", TERMS)
def test_the_number_comes_with_the_forward_pass(name: str, items: Any) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = PerSampleGradNorms(loss_reduction="mean", loss_terms=TERMS[name])
    with Monitor(model, optimizer, [metric], window_steps=1) as monitor:
        expected = [truth(model, x, y) for x, y in PARTS]
        for (x, y), norms in zip(PARTS, expected, strict=True):
            model(x, labels=y, num_items_in_batch=items)["loss"].backward()
            assert torch.allclose(metric.per_sample, norms, rtol=1e-5)
        optimizer.step()
        (window,) = monitor.history
    found = window["per_sample_grad_norm"].norm["total"].mean
    assert found.value == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("fast", ["exact", "fast"])
def test_of_single_samples_too(fast: Any) -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms="num_items_in_batch", batch_of_one=fast) as norms:
        for items in (1, 7, 3, 5, 2, 9):
            model.zero_grad()
            model(X[:1], labels=Y[:1], num_items_in_batch=items)["loss"].backward()
            assert torch.allclose(norms.per_sample, truth(model, X[:1], Y[:1]), rtol=1e-5)


def test_a_pass_without_it_has_no_number() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms="num_items_in_batch") as norms:
        for items in (5, None, 5):
            model(X, labels=Y, num_items_in_batch=items)["loss"].backward()
            assert bool(norms.per_sample.isfinite().all()) == (items is not None)
            assert ("loss_terms='num_items_in_batch': the forward pass was called without" in norms.broken) == (
                items is None
            )
        unrecorded = norms.compute().details["unrecorded"]
    assert [count for why, count in unrecorded.items() if "num_items_in_batch" in why] == [1]


def test_a_function_without_arguments_is_called_after_the_backward_pass() -> None:
    model, calls = made(), []
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=lambda: calls.append(1) or 6) as norms:
        model(X, labels=Y, num_items_in_batch=6)["loss"].backward()
        assert torch.allclose(norms.per_sample, truth(model, X, Y), rtol=1e-5)
    assert calls == [1]


def test_a_metric_with_a_keyword_is_copied_and_pickled() -> None:
    metric = PerSampleGradNorms(loss_reduction="mean", loss_terms="num_items_in_batch")
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert "loss_terms" in str(other._reduction)


def test_a_name_has_no_place_beside_a_sum() -> None:
    with pytest.raises(ValueError, match="loss_terms: a loss that is summed"):
        PerSampleGradNorms(loss_reduction="sum", loss_terms="num_items_in_batch")
