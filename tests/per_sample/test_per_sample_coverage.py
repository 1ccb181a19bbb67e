"""Which parameters are measured, and errors that name those that are not, with the ways out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph
from per_sample_models import assert_equal, made, mlp, sum_loss, train, weights
from per_sample_oracle import assert_norms, check, norms_sq, samples_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import lipcore
from lipcore import Monitor, layers

# By rules alone: what the graph measures beside them is in test_per_sample_without_rules.py.
PerSampleGradNorms = functools.partial(lipcore.PerSampleGradNorms, max_replay_bytes=0)


class Scaled(nn.Module):
    """A raw parameter behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.scale
        return y


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = kind(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


def direct(form: str) -> nn.Module:
    """F.linear on a layer's weight, beside the layer's own call or instead of it."""

    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).tanh()
        if form == "instead":
            return F.linear(h, m.b.weight, m.b.bias)
        return m.b(h) + F.linear(h.cos(), m.b.weight)

    return Graph(rule, a=nn.Linear(5, 4), b=nn.Linear(4, 3))


def with_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


STRUCTURE: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "raw parameter": (Scaled, ["'scale': there is no rule for Scaled"]),
    "LSTM": (lambda: Recurrent(nn.LSTM), ["'rnn.weight_ih_l0': there is no rule for LSTM", "4 trainable parameters"]),
    "GRU": (
        lambda: Recurrent(nn.GRU),
        ["there is no rule for GRU (so too 'rnn.weight_hh_l0', 'rnn.bias_ih_l0', 'rnn.bias_hh_l0')"],
    ),
    "batch norm": (with_statistics, ["'1.weight': normalises by the statistics of the batch", "or GroupNorm"]),
    "batch norm, not affine": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)),
        ["'1': normalises by the statistics of the batch"],
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.Linear(5, 4), parametrizations.weight_norm(nn.Linear(4, 3))),
        ["'1.parametrizations.weight.original0': is behind a parametrization"],
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.Linear(5, 4), parametrizations.spectral_norm(nn.Linear(4, 3))),
        ["'1.parametrizations.weight.original': is behind a parametrization"],
    ),
    "pruned": (
        lambda: nn.Sequential(nn.Linear(5, 4), prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)),
        ["'1.weight_orig'"],
    ),
    "old weight norm": (
        lambda: nn.Sequential(nn.Linear(5, 4), torch.nn.utils.weight_norm(nn.Linear(4, 3))),
        ["'1.weight_g'"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", STRUCTURE)
def test_what_the_structure_shows_is_said_at_once(name: str) -> None:
    build, words = STRUCTURE[name]
    model = made(build)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError) as error:
        PerSampleGradNorms(model, loss_reduction="sum")
    for word in (*words, "on_unsupported='skip'"):
        assert word in str(error.value)
    for word in ("lipcore.layers.register()", "requires_grad_(False)"):  # which keep no layer from mixing samples
        assert (word in str(error.value)) == (not name.startswith("batch norm"))
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("form", "match"),
    [
        ("beside", "'b.weight': is used 2 times in the forward pass, but only 1 times by its own layer's call"),
        ("instead", "'b.weight': is used 1 times in the forward pass, but only 0 times by its own layer's call"),
    ],
)
def test_what_only_the_first_pass_shows_is_said_then(form: str, match: str, size: int) -> None:
    model = made(lambda: direct(form))
    with pytest.raises(ValueError, match=match), PerSampleGradNorms(model, loss_reduction="sum"):
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            sum_loss(model(torch.randn(size, 5))).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_that_only_the_loss_uses() -> None:
    """Its gradient is one that no layer's call has brought."""
    model = made(lambda: Graph(lambda m, x: m.a(x), a=nn.Linear(5, 4), b=nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="'b.weight': has a gradient, but none came from its layer's hooks"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(F.linear(model(torch.randn(3, 5)), model.b.weight)).backward()


# ---- ways out


SKIPPED = ["raw parameter", "LSTM", "GRU", "weight norm", "spectral norm"]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", SKIPPED)
def test_skipping_measures_the_others(name: str, size: int) -> None:
    model = made(STRUCTURE[name][0]).eval()  # where spectral_norm does not iterate
    metric = PerSampleGradNorms(loss_reduction="sum", on_unsupported="skip")
    with Monitor(model, metrics=[metric]) as monitor:
        for _ in range(3):
            x = torch.randn(size, 2, 5) if isinstance(model, Recurrent) else torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            for parameter in metric.coverage().uncovered:
                expected.pop(parameter, None)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected)
            monitor.step()
        result = monitor.compute()["per_sample_grad_norm"]
    assert result.details["not_covered"] == metric.coverage().uncovered
    share = re.search(r"(\d+) of (\d+) trainable parameters, ([\d.]+) % of their elements", repr(metric))
    assert share
    assert share[0] in str(metric.coverage())
    assert f"over the covered parameters only: {share[0]}" in result.norm["total_of_measured"].mean.note
    assert "total" not in result.norm
    trained = [p.numel() for _, p in model.named_parameters()]
    left_out = [p.numel() for n, p in model.named_parameters() if n in metric.coverage().uncovered]
    assert share.group(1, 2) == (str(len(trained) - len(left_out)), str(len(trained)))
    assert float(share[3]) == pytest.approx(100 * (1 - sum(left_out) / sum(trained)), abs=0.1)
    assert any("not covered" in line.rule for line in metric.plan())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("form", ["beside", "instead"])
def test_skipping_leaves_out_what_the_first_pass_shows(form: str, size: int) -> None:
    model = made(lambda: direct(form))
    uncovered = {"b.weight"} if form == "beside" else {"b.weight", "b.bias"}
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as metric:
        for _ in range(3):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert set(metric.coverage().uncovered) == uncovered
            total = torch.stack([row for name, row in expected.items() if name not in uncovered]).sum(0).sqrt()
            assert torch.allclose(metric.per_sample, total, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_skipping_pruned_weights(size: int) -> None:
    model, x = made(STRUCTURE["pruned"][0]), torch.randn(size, 5)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    plain[0].load_state_dict(model[0].state_dict())
    plain[1].load_state_dict({"weight": model[1].weight, "bias": model[1].bias})
    expected = norms_sq(plain, samples_of((x,), size), sum_loss)
    del expected["1.weight"]
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected)


def test_skipping_does_not_change_the_training() -> None:
    def run(watched: bool) -> list[Tensor]:
        model = made(lambda: Recurrent(nn.LSTM))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        metric = PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        torch.manual_seed(2)
        train(model, optimizer, [torch.randn(size, 3, 5) for size in (4, 4, 1, 1, 1)])
        if monitor is not None:
            monitor.close()
        return weights(model)

    assert_equal(run(True), run(False))


def test_freezing_is_a_way_out() -> None:
    model = made(Scaled)
    model.scale.requires_grad_(False)
    metric = check(model, (torch.randn(3, 5),), loss=sum_loss)
    assert metric.coverage().frozen == ["scale"]


class ScaledRule(layers.Rule):
    """Of a module with a child: its rule covers both."""

    def save(self, module: Any, arguments: Any, keywords: Any, batch: layers.Batch) -> Any:
        x = batch.tokens(arguments[0])
        return (x,), batch

    def factors(self, module: Any, grad_output: Tensor, batch: Any, x: Tensor) -> dict[str, layers.Factor]:
        grad = batch.tokens(grad_output)
        h = F.linear(x, module.linear.weight, module.linear.bias).detach()
        inner = grad * module.scale.detach()
        return {
            "scale": layers.RowSum(grad, h),
            "linear.weight": layers.Outer(x, inner),
            "linear.bias": layers.RowSum(inner),
        }


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipcore.layers import registry

    monkeypatch.setattr(registry, "_rules", dict(registry._rules))


@pytest.mark.parametrize("size", [1, 3])
def test_a_rule_of_ones_own_that_covers_its_children(own_rules: None, size: int) -> None:
    layers.register(Scaled, ScaledRule())
    model = made(lambda: nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(4, 3)))
    metric = check(model, (torch.randn(size, 5),), loss=sum_loss)
    assert set(metric.coverage().covered) == {"0.scale", "0.linear.weight", "0.linear.bias", "2.weight", "2.bias"}


class Broken(layers.Rule):
    where = "save"

    def save(self, module: Any, arguments: Any, keywords: Any, batch: layers.Batch) -> Any:
        if self.where == "save":
            raise ZeroDivisionError("a rule's own mistake")
        return (arguments[0],), None

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, layers.Factor]:
        raise ZeroDivisionError("a rule's own mistake")


@pytest.mark.parametrize("where", ["save", "factors"])
def test_a_rule_that_raises_does_not_reach_the_training(own_rules: None, where: str) -> None:
    rule = Broken()
    rule.where = where
    layers.register(nn.Linear, rule, replace=True)
    model, plain, x = made(mlp), made(mlp), torch.randn(3, 5)
    sum_loss(plain(x)).backward()
    with pytest.raises(RuntimeError, match=r"module '[03]' \(Linear\): a rule's own mistake"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(x)).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


# ---- coverage()


def test_the_coverage_of_a_model() -> None:
    model = made(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), parametrizations.weight_norm(nn.Linear(4, 3, False)))
    )
    model[1].bias.requires_grad_(False)
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as metric:
        coverage = metric.coverage()
        assert coverage.covered == {
            "0.weight": "0 (Linear)",
            "0.bias": "0 (Linear)",
            "1.weight": "1 (LayerNorm)",
        }
        assert coverage.frozen == ["1.bias"]
        assert set(coverage.uncovered) == {
            "2.parametrizations.weight.original0",
            "2.parametrizations.weight.original1",
        }
        text = str(coverage)
        for line in ("covered      0.weight: 0 (Linear)", "frozen       1.bias", "not covered  2.parametrizations"):
            assert line in text


def test_tied_parameters_are_covered_by_both_layers() -> None:
    from per_sample_models import Transformer

    with PerSampleGradNorms(made(Transformer), loss_reduction="sum") as metric:
        assert metric.coverage().covered["embedding.weight"] == "embedding (Embedding) + head (Linear)"


def test_no_coverage_before_there_is_a_model() -> None:
    with pytest.raises(RuntimeError, match="this metric watches no model yet"):
        PerSampleGradNorms(loss_reduction="sum").coverage()


def test_parametrizing_in_mid_run_is_no_wrong_number() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum")
    monitor = Monitor(model, metrics=[metric])
    sum_loss(model(torch.randn(3, 5))).backward()
    parametrize.register_parametrization(model[3], "weight", nn.Tanh())
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        sum_loss(model(torch.randn(3, 5))).backward()
    with pytest.raises(ValueError, match=r"parameter '3.weight' is not there any more.*Monitor.rebind"):
        monitor.compute()
    monitor.close()


def test_pruning_in_mid_run_is_no_wrong_number() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum")
    monitor = Monitor(model, metrics=[metric])
    sum_loss(model(torch.randn(3, 5))).backward()
    prune.l1_unstructured(model[3], "weight", 0.5)
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        sum_loss(model(torch.randn(3, 5))).backward()
    with pytest.raises(ValueError, match=r"parameter '3.weight' is not there any more.*Monitor.rebind"):
        monitor.compute()
    monitor.close()


def test_a_layer_that_is_added_in_mid_run() -> None:
    """Its parameters are not among those that are measured, until rebind()."""
    model, x = made(mlp), torch.randn(3, 5)
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        sum_loss(model(x)).backward()
        monitor.step()
        model.add_module("5", nn.Linear(4, 2))
        monitor.rebind()
        model.zero_grad()
        sum_loss(model(x)).backward()
        assert_norms(metric, norms_sq(model, samples_of((x,), 3), sum_loss))
        monitor.step()
        assert monitor.compute()["per_sample_grad_norm"].norm["5"].mean.count == 3


def test_no_number_of_a_part_stands_under_the_name_of_the_whole() -> None:
    parts = {"a": nn.Linear(5, 4), "b": nn.GRU(4, 4, batch_first=True), "c": nn.Linear(4, 2)}
    model = made(lambda: Graph(lambda m, x: m.c(m.b(m.a(x))[0]), **parts))
    reference = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    options: dict[str, Any] = {"loss_reduction": "sum", "on_unsupported": "skip", "max_replay_bytes": 0}
    norms = lipcore.PerSampleGradNorms(noise_scale=True, keep_factors=True, methods={"a": "estimate"}, **options)
    dots = lipcore.PerSampleGradDots(reference=reference, **options)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Monitor(model, optimizer, metrics=[norms, dots]) as monitor:
        sum_loss(model(torch.randn(3, 4, 5))).backward()
        for rows in (norms.gram(), norms.standard_error):
            assert "total_of_measured" in rows
            assert "total" not in rows
        assert "total_of_measured" in repr(norms)
        assert "total_of_measured" in repr(dots)
        optimizer.step()
        found = monitor.compute()
    for result in (found[norms.name], found[dots.name]):
        for quantity in result.values():
            assert [p for p in quantity if quantity.level(p) == "total"] == ["total_of_measured"]
        assert not [key for key in result.flat() if key.endswith("total")]
