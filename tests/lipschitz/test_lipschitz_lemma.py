"""r and lambda from the ordinary backward pass against float64 autograd, one sample at a time."""

from __future__ import annotations

import warnings

import pytest
import torch
from first_layers import LEMMA, behind
from models import Graph, mlp, observe, reference, relative_error, seeded
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("case", LEMMA)
def test_lemma(case: str, dtype: torch.dtype, tolerance: float) -> None:
    build, shape, first = LEMMA[case]
    model = seeded(build, dtype=dtype)
    x = torch.randn(6, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected_r, expected_lambda = reference(model, x, first=first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no input goes past these first layers
        warnings.filterwarnings("ignore", "Using padding='same'")  # torch's
        r, lambdas = observe(model, x)
    assert expected_lambda is not None
    for found, expected in ((r, expected_r), (lambdas, expected_lambda)):
        if dtype == torch.float32:  # the network's own rounding: relative to the batch, not to where terms cancel
            found, expected = found / expected.max(), expected / expected.max()
            assert float((found - expected).abs().max()) <= tolerance
        assert relative_error(found, expected) <= (tolerance if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize(
    "case", ["linear", "linear_tokens", "conv2d_circular", "frozen_layer_in_place", "attention_after"]
)
def test_a_batch_brings_what_single_samples_bring(case: str) -> None:
    build, shape, _ = LEMMA[case]
    model = seeded(build, dtype=torch.float64)
    x = torch.randn(5, *shape, dtype=torch.float64)
    together = observe(model, x)
    alone = [observe(model, x[i : i + 1], batch_of_one="exact") for i in range(5)]
    for k in range(2):
        assert relative_error(torch.cat([pair[k] for pair in alone]), together[k]) <= 1e-12


def test_behind_an_embedding_lambda_is_r_and_there_is_no_sandwich() -> None:
    model = seeded(lambda: behind(nn.Embedding(11, 4), 12, nn.Tanh()), dtype=torch.float64)
    x = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 10, 0]])
    expected, _ = reference(model, x)
    for freeze in (False, True):
        model[0].weight.requires_grad_(not freeze)
        metric = Lipschitz()
        with Monitor(model, metrics=[metric]) as monitor:
            model(x).square().sum().backward()
            monitor.flush()
            assert relative_error(metric.per_sample.normalized_gradient_norm, expected) <= 1e-12
            monitor.step()
            result = monitor.compute()["lipschitz"]
        assert relative_error(metric.per_sample.local_lipschitz, expected) <= 1e-12
        assert "at the output of Embedding '0'" in result.local_lipschitz["model:Linear"].mean.note
        assert "sandwich" not in result
        assert result.normalized_gradient_norm["model:Linear"].mean.label == "exact"


def test_parametrized_first_layer_counts_with_its_effective_weight() -> None:
    def build() -> nn.Module:
        model = mlp(5, 7, 1)
        torch.nn.utils.parametrizations.weight_norm(model[0])
        return model

    model = seeded(build, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(model, x)
    for found, wanted in zip(observe(model, x), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


def test_first_layer_called_by_keyword() -> None:
    model = seeded(
        lambda: Graph(lambda m, x: m.head(m.first(input=x).relu()), first=nn.Linear(5, 7), head=nn.Linear(7, 1)),
        dtype=torch.float64,
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference_by_keyword(model, x)
    found = observe(model, x)
    assert relative_error(found[0], expected[0]) <= 1e-12
    assert relative_error(found[1], expected[1]) <= 1e-12


def reference_by_keyword(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    r, lambdas = reference(model, x, first="first")
    assert lambdas is not None
    return r, lambdas


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_half_precision_is_right_to_its_own_precision(way: str) -> None:
    model = seeded(lambda: mlp(6, 9, 8, 1, activation=nn.GELU))
    x = torch.randn(16, 6)
    expected = reference(model, x)
    if way == "bfloat16":
        found = observe(model.bfloat16(), x.bfloat16())
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = observe(model, x)
    for got, wanted in zip(found, expected, strict=True):
        assert relative_error(got, wanted) <= 0.1
        assert float((got / wanted).mean()) == pytest.approx(1, abs=0.02)
