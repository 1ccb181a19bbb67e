"""Hooks in eager mode: input skips, several Monitors, threads, activation checkpointing."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from models import Graph, batches, mlp, mse, observe, reference, relative_error, seeded, sgd, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from windows import assert_unhooked, ratios_of

from lipcore import Lipschitz, Monitor

# ---- what goes past the first layer


def input_skip(concatenated: bool = False) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).relu()
        return m.head(torch.cat([h, x], 1) if concatenated else h + x)

    return Graph(rule, first=nn.Linear(5, 5), head=nn.Linear(10 if concatenated else 5, 1))


@pytest.mark.parametrize("concatenated", [False, True], ids=["added", "concatenated"])
def test_an_input_skip_leaves_lambda_exact_and_takes_the_sandwich(concatenated: bool) -> None:
    model = seeded(lambda: input_skip(concatenated), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected_r, expected_lambda = reference(model, x, first="first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, metrics=[Lipschitz(lambda_every=1)], window_steps=1) as monitor:
            for _ in range(3):
                model(x).sum().backward()
                monitor.step()
    for window in monitor.history:
        result = window["lipschitz"]
        assert result.normalized_gradient_norm["model"].mean.label == "exact"
        assert result.normalized_gradient_norm["model"].mean.value == pytest.approx(float(expected_r.mean()), rel=1e-12)
        assert result.local_lipschitz["model"].mean.label == "exact"
        assert result.local_lipschitz["model"].mean.value == pytest.approx(float(expected_lambda.mean()), rel=1e-12)
        assert not result.sandwich["model"].lower.valid
        assert "W_1 x + b_1 of 'first' alone" in result.sandwich["model"].lower.note


# ---- several at once


def test_two_monitors_on_one_model() -> None:
    model = seeded(lambda: mlp(5, 7, 6, 1), dtype=torch.float64)
    data = [(x.double(), y.double()) for x, y in batches(6, 1)]
    expected = []
    with Monitor(model, metrics=[Lipschitz()]) as one:
        with Monitor(model, metrics=[Lipschitz(input="2")]) as two:
            for x, y in data:
                twin = mlp(5, 7, 6, 1).double()
                twin.load_state_dict(model.state_dict())
                expected.append([float(reference(twin, x, first=name)[0]) for name in ("0", "2")])
                model.zero_grad()
                mse(model(x), y).backward()
                one.step()
                two.step()
        assert ratios_of(two.compute())[:2] == pytest.approx((6, sum(e[1] for e in expected)), rel=1e-12)
        assert ratios_of(one.compute())[:2] == pytest.approx((6, sum(e[0] for e in expected)), rel=1e-12)
        model.zero_grad()
        mse(model(data[0][0]), data[0][1]).backward()
        one.step()
        assert ratios_of(one.compute())[0] == 7
    assert_unhooked(model)


def test_two_lipschitz_metrics_in_one_monitor_need_two_names() -> None:
    class Hidden(Lipschitz):
        name = "hidden"

    model = seeded(lambda: mlp(5, 7, 6, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = [reference(model, x, first=name) for name in ("0", "2")]
    with Monitor(model, metrics=[Lipschitz(), Hidden(input="2")]) as monitor:
        model(x).sum().backward()
        monitor.step()
        window = monitor.compute()
    for name, (r, _) in zip(("lipschitz", "hidden"), expected, strict=True):
        assert window[name].normalized_gradient_norm["model:Linear"].mean.value == pytest.approx(
            float(r.mean()), rel=1e-12
        )


@pytest.mark.parametrize("size", [1, 4])
def test_two_models_in_two_threads(size: int) -> None:
    def run(seed: int, results: dict[int, Any]) -> None:
        generator_free = [(x + seed, y) for x, y in batches(60, size)]
        model = models[seed]
        optimizer = sgd(model)
        with Monitor(model, optimizer) as monitor:
            train(model, generator_free, optimizer)
            results[seed] = monitor.compute()

    one_after_the_other: dict[int, Any] = {}
    models = {seed: seeded(lambda: mlp(5, 7, 6, 1), seed) for seed in (0, 1)}
    for seed in (0, 1):
        run(seed, one_after_the_other)
    models = {seed: seeded(lambda: mlp(5, 7, 6, 1), seed) for seed in (0, 1)}
    together: dict[int, Any] = {}
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert ratios_of(together[seed])[0] == 60 * size
        assert together[seed].to_dict() == one_after_the_other[seed].to_dict()


# ---- activation checkpointing


class Checkpointed(nn.Module):
    """Two blocks and a head; `around` names the block that is recomputed in the backward pass."""

    def __init__(self, around: str, reentrant: bool) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)
        self.first = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Linear(7, 6), nn.Tanh())
        self.around, self.reentrant = around, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for name in ("first", "middle"):
            block = getattr(self, name)
            h = checkpoint(block, h, use_reentrant=self.reentrant) if self.around == name else block(h)
        return self.head(h)


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("around", ["first", "middle"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_activation_checkpointing(reentrant: bool, around: str, size: int, named: bool) -> None:
    model = seeded(lambda: Checkpointed(around, reentrant), dtype=torch.float64)
    bare = seeded(lambda: Checkpointed("", reentrant), dtype=torch.float64)
    x = torch.randn(3, size, 5, dtype=torch.float64)
    expected_r, expected_lambda = reference(bare, x.flatten(0, 1), first="first.0")
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        metric = Lipschitz(input="first.0" if named else None)
        monitor = Monitor(model, metrics=[metric]) if watched else None
        for batch in x:
            model(batch.clone().requires_grad_()).square().sum().backward()
            if monitor is not None:
                monitor.step()
        gradients.append([p.grad.clone() for p in model.parameters()])
        if monitor is not None:
            result = monitor.compute()["lipschitz"]
            monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert result.details["first_layer"] == "first.0"
    count, total, mean = ratios_of(result)
    assert count == 3 * size
    assert total == pytest.approx(float(expected_r.sum()), rel=1e-12)
    if reentrant:
        assert "use_reentrant=False" in result.details["local_lipschitz_off"]
    else:
        assert mean == pytest.approx(float(expected_lambda.mean()), rel=1e-12)
    assert result.details["unrecorded_forwards"] == 0


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_everything_checkpointed(named: bool) -> None:
    body = seeded(lambda: Checkpointed("", True), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(body, x, first="first.0")
    model = Graph(lambda m, x: checkpoint(m.body, x, use_reentrant=True).squeeze(1), body=body)
    points = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="local_lipschitz off: reentrant checkpoints"):
        r, lambdas = observe(model, points, input="body.first.0" if named else None)
    assert relative_error(r, expected[0]) <= 1e-12
    assert lambdas.isnan().all()


def test_the_first_layer_is_the_first_that_gradients_can_reach() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = m.backbone(x).relu()
        return m.head(m.hidden(features).relu())

    model = seeded(
        lambda: Graph(rule, backbone=nn.Linear(5, 6), hidden=nn.Linear(6, 7), head=nn.Linear(7, 1)), dtype=torch.float64
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    features = model.backbone(x).relu().detach()
    rest = Graph(lambda m, h: m.head(m.hidden(h).relu()), hidden=model.hidden, head=model.head)
    expected = reference(rest, features, first="hidden")
    with pytest.warns(UserWarning, match="local_lipschitz off: the output does not depend on the input"):
        r, lambdas = observe(model, x)
    assert relative_error(r, expected[0]) <= 1e-12
    assert lambdas.isnan().all()
    for found, wanted in zip(observe(model, x, input="hidden"), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("layer", [nn.Linear, OwnLinear])
def test_a_model_that_is_its_own_first_layer_is_recorded_in_every_step(layer: type[nn.Linear]) -> None:
    model = seeded(lambda: layer(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[Lipschitz()], window_steps=2) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
        counts = [ratios_of(window)[0] for window in monitor.history]
    assert counts == [8, 8, 8]
    assert not model._forward_hooks


def test_two_backward_passes_through_one_graph_are_one_record() -> None:
    """They bring the same ratios."""
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, metrics=[Lipschitz(batch_of_one="exact")]) as monitor:
        loss = model(torch.randn(3, 5)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        monitor.step()
        assert ratios_of(monitor.compute())[0] == 3
