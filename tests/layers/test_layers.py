"""Every layer with a rule against the oracle, and the registry."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, Case
from per_sample_oracle import assert_norms, check, norms_sq, seeded, weighted_sum
from torch import Tensor, nn

import lipcore
from lipcore import layers

ids = {"argvalues": list(CASES.values()), "ids": list(CASES)}


@pytest.mark.parametrize("case", **ids)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_against_one_sample_at_a_time(case: Case, size: int) -> None:
    with seeded(size):
        check(case.make(), case.arguments(size))


@pytest.mark.parametrize("case", **ids)
def test_mean_reduction(case: Case) -> None:
    with seeded(1):
        check(case.make(), case.arguments(5), reduction="mean")


@pytest.mark.parametrize("case", **ids)
def test_float64(case: Case) -> None:
    with seeded(2):
        arguments = tuple(a.double() if a.is_floating_point() else a for a in case.arguments(3))
        check(case.make().double(), arguments, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", **ids)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """The model rounds its output, and so the loss's gradient: the oracle is only that close."""
    if not case.low_precision:
        pytest.skip("torch has no accurate form of it in this dtype on the CPU")
    with seeded(3):
        arguments = tuple(a.to(dtype) if a.is_floating_point() else a for a in case.arguments(3))
        check(case.make().to(dtype), arguments, loss=lambda y: y.double().sum(), tolerance=2e-2)


@pytest.mark.parametrize("case", **ids)
def test_any_instruction_set(case: Case, isa: str) -> None:
    with seeded(4):
        check(case.make(), case.arguments(3))


@pytest.mark.parametrize("case", **ids)
def test_strided_input(case: Case) -> None:
    with seeded(5):
        arguments = tuple(
            torch.stack([a, a], -1)[..., 0] if a.dim() > 1 else torch.stack([a, a], -1)[:, 0] for a in case.arguments(3)
        )
        assert not any(a.is_contiguous() for a in arguments if a.numel() > 1)
        check(case.make(), arguments)


@pytest.mark.parametrize("case", **ids)
def test_every_rule_joins_and_gives_single_gradients(case: Case) -> None:
    """A module that is called twice: squares must not be added."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = case.make()

        def forward(self, *arguments: Tensor) -> Tensor:
            again = (a.roll(1, -1) if a.dim() > 1 else a for a in arguments)
            return torch.cat([self.layer(*arguments).flatten(1), 2 * self.layer(*again).flatten(1)], 1)

    with seeded(6):
        model = Twice()
        model.train(model.layer.training)
        check(model, case.arguments(3), tolerance=1e-5 if "norm" not in str(model.layer) else 1e-4)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.LayerNorm(5), nn.BatchNorm1d(5).eval()], ids=str)
def test_frozen_parameters_are_left_out(layer: nn.Module, frozen: str) -> None:
    with seeded(7):
        getattr(layer, frozen).requires_grad_(False)
        metric = check(layer, (torch.randn(4, 5),))
        assert metric.coverage().frozen == [frozen]
        getattr(layer, frozen).requires_grad_(True)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(5), "statistics of the batch"),
        (nn.BatchNorm1d(5, affine=False), "statistics of the batch"),
        (nn.BatchNorm1d(5, track_running_stats=False).eval(), "statistics of the batch"),
        (nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.EmbeddingBag(5, 3, mode="max"), "mode='sum' and 'mean'"),
        (nn.LSTM(5, 3), "no rule for LSTM"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), "parametrization"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_measured_is_refused_by_name(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), layer)
    with pytest.raises(ValueError, match=reason) as error:
        lipcore.PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0)
    assert "'1" in str(error.value)


# ---- reuse and ties


class Tied(nn.Module):
    def __init__(self, tokens: int = 11, features: int = 6, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, features, padding_idx=padding_idx)
        self.head = nn.Linear(features, tokens)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.embedding(ids)))
        return y


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_tied_to_the_head(padding_idx: int | None) -> None:
    with seeded(8):
        check(Tied(padding_idx=padding_idx), (torch.randint(11, (4, 9)),))


def test_linear_called_with_different_lengths() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.tanh(self.linear(x)).mean(1))
            return y

    with seeded(9):
        check(Pooled(), (torch.randn(3, 7, 5),))


# ---- the registry


class Scale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scale * x)  # which keeps its output


class ScaleRule(layers.Rule):
    def save(self, module, arguments, keywords, batch):  # type: ignore[no-untyped-def]
        return (batch.tokens(arguments[0]),), batch

    def factors(self, module, grad_output, batch, x):  # type: ignore[no-untyped-def]
        y = torch.sigmoid(module.scale.detach() * x)
        return {"scale": layers.RowSum(batch.tokens(grad_output) * y * (1 - y), x)}


def test_a_layer_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipcore.layers import registry

    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    model = nn.Sequential(nn.Linear(5, 4), Scale(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="no rule for Scale"):
        lipcore.PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0)
    layers.register(Scale, ScaleRule())
    check(model, (torch.randn(6, 5),))
    with pytest.raises(ValueError, match="replace=True"):
        layers.register(Scale, ScaleRule())
    layers.register(Scale, ScaleRule(), replace=True)


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
def test_bags_of_different_lengths(mode: str, weighted: bool, include_last_offset: bool) -> None:
    from layer_cases import BagOf, bags

    with seeded(10):
        model = BagOf(weighted, mode=mode, include_last_offset=include_last_offset)
        arguments = bags(6)
        expected = norms_sq(model, [(i[None], c[None]) for i, c in zip(*arguments, strict=True)], weighted_sum)
        with lipcore.PerSampleGradNorms(model, loss_reduction="sum") as metric:
            weighted_sum(model(*arguments)).backward()
            assert_norms(metric, expected)
