"""MultiheadAttention inside a model: both outputs, both batch orders, positions; against one sample at a time."""

from __future__ import annotations

import pytest
import torch
from per_sample_oracle import assert_norms, check, norms_sq, seeded, weighted_sum
from torch import Tensor, nn

import lipcore


class Block(nn.Module):
    def __init__(self, positions: str = "none", **options: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.positions = positions
        self.weights_in_loss = False
        self.need_weights = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.positions != "none":
            p = self.position(torch.arange(tokens.shape[1], device=tokens.device))
            p = nn.functional.dropout(p, 0.0) if self.positions == "dropout" else p
            x = x + (p.unsqueeze(0) if self.positions == "unsqueezed" else p)
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        out = self.head(self.norm(x + y))
        return out + weights.square().sum((1, 2))[:, None, None] * out if self.weights_in_loss else out


def _tokens(size: int = 5, length: int = 7) -> Tensor:
    return torch.randint(11, (size, length))


@pytest.mark.parametrize(
    ("bias", "need_weights", "compiled"),
    [
        *((bias, need_weights, False) for bias in (False, True) for need_weights in (False, True)),
        (True, True, True),
        pytest.param(False, False, True, marks=pytest.mark.ci),
    ],
)
def test_attention_in_a_model(bias: bool, need_weights: bool, compiled: bool) -> None:
    with seeded(1):
        model = Block(bias=bias)
        model.position = None
        model.need_weights = need_weights
        tokens = _tokens()
        expected = norms_sq(model, [(row[None],) for row in tokens], weighted_sum)
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with lipcore.PerSampleGradNorms(called, loss_reduction="sum") as metric:
            weighted_sum(called(tokens)).backward()
            assert_norms(metric, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_weights_in_the_loss_are_refused(compiled: bool) -> None:
    model = Block()
    model.position = None
    model.need_weights = model.weights_in_loss = True
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with pytest.raises(ValueError, match="'attention' .*MultiheadAttention.*need_weights=False"):
        with lipcore.PerSampleGradNorms(called, loss_reduction="sum", max_replay_bytes=0) as metric:
            weighted_sum(called(_tokens())).backward()
            _ = metric.per_sample


def test_attention_weights_in_the_loss_are_measured_from_the_next_pass_on() -> None:
    with seeded(3):
        model, tokens = Block(), _tokens()
        model.position = None
        model.need_weights = model.weights_in_loss = True
        expected = norms_sq(model, [(row[None],) for row in tokens], weighted_sum)
        with lipcore.PerSampleGradNorms(model, loss_reduction="sum") as metric:
            weighted_sum(model(tokens)).backward()
            assert metric.per_sample.isnan().all()
            assert "measured from the autograd graph" in metric.broken
            for _ in range(2):
                weighted_sum(model(tokens)).backward()
                assert_norms(metric, expected)
                assert not metric.unproved


@pytest.mark.parametrize("positions", ["plain", "unsqueezed", "dropout"])
def test_positions_that_are_as_many_as_samples(positions: str) -> None:
    with seeded(2):
        model, tokens = Block(positions), _tokens(6, 6)
        with pytest.raises(ValueError, match="'position' .*broadcast="):
            with lipcore.PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0) as metric:
                weighted_sum(model(tokens)).backward()
                _ = metric.per_sample
        check(model, (tokens,))
        if positions == "unsqueezed":
            return
        expected = norms_sq(model, [(row[None],) for row in tokens], weighted_sum)
        with lipcore.PerSampleGradNorms(model, loss_reduction="sum", broadcast=["position"]) as metric:
            weighted_sum(model(tokens)).backward()
            assert_norms(metric, expected)


@pytest.mark.parametrize("on_unsupported", ["error", "skip"])
def test_an_expanded_output_must_keep_its_dimensions(on_unsupported: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(0, (1, 6)))
    options = {"loss_reduction": "sum", "broadcast": ["0"], "on_unsupported": on_unsupported}
    with pytest.raises(ValueError, match=r"'0' is expanded to \[6, 6, 4\].*input of shape \[1, T\]"):
        with lipcore.PerSampleGradNorms(model, **options):  # type: ignore[arg-type]
            model(torch.randn(6, 3))


def test_positions_in_a_compiled_model_are_refused() -> None:
    model = Block("plain")
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="name the layer in broadcast="):
        with lipcore.PerSampleGradNorms(called, loss_reduction="sum"):
            weighted_sum(called(_tokens(6, 6))).backward()


def test_labels_are_no_positions() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label, self.tokens, self.head = nn.Embedding(4, 8), nn.Embedding(11, 8), nn.Linear(8, 2)

        def forward(self, tokens: Tensor, label: Tensor) -> Tensor:
            return self.head(self.tokens(tokens) + self.label(label)[:, None])

    with seeded(3):
        model, tokens, labels = Conditioned(), _tokens(6, 6), torch.randint(4, (6,))
        expected = norms_sq(model, [(t[None], l[None]) for t, l in zip(tokens, labels, strict=True)], weighted_sum)
        with lipcore.PerSampleGradNorms(model, loss_reduction="sum") as metric:
            weighted_sum(model(tokens, labels)).backward()
            assert_norms(metric, expected)
