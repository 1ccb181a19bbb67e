"""lambda where its first check cannot go through the graph once more: compared in another way, or not labelled
exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import Normalize, before, constants
from models import Graph, mlp, relative_error, seeded
from oracle import same_bits
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms
from lipcore.metric.results import MetricResult


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


X = data(5, 5)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "a chain": lambda: mlp(5, 7, 1),
    "wired": lambda: Graph(lambda m, x: m.rest(x), rest=mlp(5, 7, 1)),
    "something before": lambda: Graph(lambda m, x: m.rest(x), rest=before(Normalize())),
}
VECTOR: dict[str, Callable[[], nn.Module]] = {
    "a chain": lambda: mlp(5, 7, 3),
    "something before": lambda: nn.Sequential(Normalize(), nn.Flatten(), mlp(5, 7, 3)),
}


def beside() -> nn.Module:
    """Has an output beside the one that is meant, which the loss may use."""

    def rule(m: Any, x: Tensor) -> dict[str, Tensor]:
        hidden = m.first(2 * x).tanh()
        return {"logits": m.head(hidden), "hidden": hidden}

    return Graph(rule, first=nn.Linear(5, 4), head=nn.Linear(4, 1))


def past(out: dict[str, Tensor]) -> Tensor:
    return out["logits"].square().sum() + out["hidden"].square().sum()


def plain(out: Tensor) -> Tensor:
    return out.square().sum()


def observed(
    model: nn.Module, loss: Callable[[Any], Tensor] = plain, *others: Any, passes: int = 3, **settings: Any
) -> tuple[Tensor, MetricResult, list[str]]:
    """lambda of the last pass, the window, and what was warned of."""
    metric = Lipschitz(**({"lambda_every": 1} | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, metrics=[metric, *others]) as monitor:
            for _ in range(passes):
                model.zero_grad()
                loss(model(X)).backward()
                monitor.step()
            result = monitor.compute()["lipschitz"]
            nothing = result.details.get("local_lipschitz_off") is not None
            lambdas = torch.tensor(torch.nan) if nothing else metric.per_sample.local_lipschitz
    return lambdas, result, [str(w.message) for w in caught if "turned local_lipschitz off" in str(w.message)]


def mean(result: MetricResult) -> Any:
    (values,) = result.local_lipschitz.values()
    return values["mean"]


def assert_off(result: MetricResult, warned: list[str]) -> None:
    assert not mean(result).valid
    assert mean(result).value != mean(result).value
    assert "two samples' outputs alone have another gradient at the input" in mean(result).note
    assert len(warned) == 1


def double(build: Callable[[], nn.Module]) -> nn.Module:
    return seeded(build, dtype=torch.float64)


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


# ---- hooks of modules on gradients


@pytest.mark.parametrize("everywhere", [False, True], ids=["module", "every_module"])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_that_only_look_leave_it_exact_and_see_the_training_alone(name: str, everywhere: bool) -> None:
    model, seen = double(MODELS[name]), []
    last = layers(model)[-1]

    def look(module: nn.Module, into: Any, out: Any) -> None:
        if module is last:
            seen.append(out)

    register = nn.modules.module.register_module_full_backward_hook
    handle = register(look) if everywhere else last.register_full_backward_hook(look)
    try:
        lambdas, result, warned = observed(model)
    finally:
        handle.remove()
    assert relative_error(lambdas, constants(double(MODELS[name]), X)) <= 1e-11
    assert mean(result).label == "exact"
    assert not mean(result).note
    assert not warned
    assert len(seen) == 3


@pytest.mark.parametrize("name", MODELS)
def test_hooks_that_change_gradients_turn_it_off(name: str) -> None:
    model = double(MODELS[name])
    layers(model)[-1].register_full_backward_hook(lambda module, into, out: (into[0] / 2,))
    _, result, warned = observed(model)
    assert_off(result, warned)


def test_hooks_that_come_later_are_noticed_at_the_next_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipcore.capture.taps.cost_share import CostShare

    monkeypatch.setattr(CostShare, "is_due", True)  # every window is checked
    model = double(MODELS["wired"])
    with Monitor(model, metrics=[Lipschitz()], window_steps=1) as monitor, pytest.warns(UserWarning, match="turned"):
        for step in range(3):
            if step == 1:
                layers(model)[-1].register_full_backward_hook(lambda module, into, out: (into[0] / 2,))
            plain(model(X)).backward()
            monitor.step()
    assert [mean(window["lipschitz"]).valid for window in monitor.history] == [True, False, False]


@pytest.mark.parametrize("name", VECTOR)
def test_several_values_beside_hooks_are_not_labelled_more_than_they_are(name: str) -> None:
    model = double(VECTOR[name])
    _, without, _ = observed(model)
    assert mean(without).label == "one-sided"
    layers(model)[-1].register_full_backward_hook(lambda module, into, out: None)
    _, result, _ = observed(model)
    assert mean(result).value == pytest.approx(mean(without).value, rel=1e-11)
    assert mean(result).label == "heuristic"
    assert "not compared with the gradients of single samples" in mean(result).note
    assert "its modules have hooks on gradients" in mean(result).note


# ---- beside per-sample norms


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"normalized": True}, {"fused": True}, {"batch_of_one": "fast"}], ids=str)
def test_beside_norms_the_check_is_none_of_their_passes(name: str, settings: dict[str, Any]) -> None:
    found, gradients = [], []
    for with_lambda in (True, False):
        model, norms = double(MODELS[name]), PerSampleGradNorms(loss_reduction="sum", **settings)
        metrics = [Lipschitz(lambda_every=1), norms] if with_lambda else [norms]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Monitor(model, metrics=metrics) as monitor:
                for x in (X, X[:1], X[:1], X[:1], X[:1], X):
                    model.zero_grad()
                    plain(model(x)).backward()
                    assert bool(norms.per_sample.isfinite().all())
                    if "normalized" in settings:
                        assert all(bool(rows.isfinite().all()) for rows in norms.normalized.values())
                    monitor.step()
                window = monitor.compute()
        found.append(window["per_sample_grad_norm"].to_dict())
        gradients.append([p.grad for p in model.parameters()])
        if with_lambda:
            assert mean(window["lipschitz"]).label == "exact"
    assert found[0] == found[1]
    assert all(same_bits(one, other) for one, other in zip(*gradients, strict=True))


def test_beside_norms_several_values_are_checked_in_the_graph() -> None:
    model = double(VECTOR["something before"])
    _, alone, _ = observed(model)
    _, result, warned = observed(model, plain, PerSampleGradNorms(loss_reduction="sum"))
    assert mean(result).value == pytest.approx(mean(alone).value, rel=1e-11)
    assert mean(result).label == "one-sided"
    assert not warned


def test_beside_norms_a_loss_past_the_output_turns_it_off() -> None:
    norms = PerSampleGradNorms(loss_reduction="sum")
    _, result, warned = observed(double(beside), past, norms, output="logits")
    assert_off(result, warned)
    assert not norms.broken


# ---- compiled models


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_are_compared_with_an_eager_pass(name: str, fresh_dynamo: Any) -> None:
    model = torch.compile(double(MODELS[name]), fullgraph=True, backend="aot_eager")
    settings = {} if name == "a chain" else {"input": "rest.0"} if name == "wired" else {}
    lambdas, result, warned = observed(model, **settings)
    assert relative_error(lambdas, constants(double(MODELS[name]), X)) <= 1e-11
    assert mean(result).label == "exact"
    assert not mean(result).note
    assert not warned
    assert sum(fresh_dynamo["graph_break"].values()) == 0


def test_in_a_compiled_model_a_loss_past_the_output_turns_it_off(fresh_dynamo: Any) -> None:
    model = torch.compile(double(beside), fullgraph=True, backend="aot_eager")
    _, result, warned = observed(model, past, output="logits")
    assert_off(result, warned)


def test_in_a_compiled_model_a_product_past_the_output_is_off_too(fresh_dynamo: Any) -> None:
    def rule(m: Any, x: Tensor) -> dict[str, Tensor]:
        hidden = m.first(x).tanh()
        return {"logits": m.head(hidden), "hidden": hidden}

    build = lambda: Graph(rule, first=nn.Linear(5, 4), head=nn.Linear(4, 1))  # noqa: E731
    model = torch.compile(double(build), fullgraph=True, backend="aot_eager")
    _, result, warned = observed(model, past, output="logits", input="first")
    assert_off(result, warned)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (VECTOR["something before"], "has several values per sample"),
        (lambda: nn.Sequential(Normalize(), nn.Dropout(0.3), mlp(5, 7, 1)), "draws random numbers"),
    ],
    ids=["vector", "random"],
)
def test_what_is_not_compared_in_a_compiled_model_is_not_exact(
    build: Callable[[], nn.Module], why: str, fresh_dynamo: Any
) -> None:
    model = torch.compile(double(build), fullgraph=True, backend="aot_eager")
    _, result, warned = observed(model)
    assert mean(result).valid
    assert mean(result).label == "heuristic"
    assert "it is compiled" in mean(result).note
    assert why in mean(result).note
    assert not warned
