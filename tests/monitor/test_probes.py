"""monitor.probe(): constants at fixed points, a value per window, and a training run that does not notice."""

from __future__ import annotations

import math

import pytest
import torch
from models import mlp, mse, seeded, sgd
from torch import nn

import lipcore
from lipcore import Monitor, local_lipschitz
from lipcore.regions import activation_patterns


def train(model: nn.Module, monitor: Monitor | None, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model(torch.randn(6, 5, generator=generator)), torch.ones(6, 1)).backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["by steps", "by hand"])
def test_every_window_has_the_constants_of_its_close(how: str) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    x = 10 * torch.randn(50, 5)
    optimizer = sgd(model)
    with Monitor(model, optimizer, window_steps=2 if how == "by steps" else None) as monitor:
        probe = monitor.probe(x, "far", regions=True, batch_size=16)
        assert torch.equal(probe.values, local_lipschitz(model, x))
        before = activation_patterns(model, x)
        for _ in range(2):
            train(model, monitor, optimizer, 2)
            window = monitor.close_window() if how == "by hand" else monitor.pop_window()
            assert window is not None
            truth, after = local_lipschitz(model, x), activation_patterns(model, x)
            found = window["probes"].local_lipschitz["far"]
            assert found.mean.value == pytest.approx(float(truth.mean()))
            assert found.max.value == pytest.approx(float(truth.max()))
            assert (found.mean.count, found.mean.label) == (50, "exact")
            assert torch.equal(probe.values, truth)
            assert window["probes"].regions["far"].last.value == after.regions
            assert window["probes"].region_churn["far"].last.value == before.churn(after)
            before = after
        train(model, monitor, optimizer, 1)
        assert "probes" not in monitor.compute()
        assert len(monitor.history.series("probes", "local_lipschitz", "far", "p99")) == 2
        assert "probes/local_lipschitz.mean/far" in monitor.history[-1].flat()


def test_training_is_the_same_bit_for_bit() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    models = []
    for probed in (False, True):
        model = seeded(make)
        optimizer = sgd(model)
        torch.manual_seed(3)
        with Monitor(model, optimizer, metrics=[lipcore.Trajectory()], window_steps=1) as monitor:
            if probed:
                monitor.probe(torch.ones(3, 5), "ones")
            train(model, monitor, optimizer)
        assert all(module.training for module in model.modules())
        models.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


def test_a_window_closed_after_the_monitor_was() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, optimizer := sgd(model)) as monitor:
        monitor.probe(torch.ones(3, 5), "ones")
        train(model, monitor, optimizer)
    assert monitor.close_window()["probes"].local_lipschitz["ones"].mean.count == 3


def test_diverged_training_is_reported_and_not_stopped() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, sgd(model)) as monitor:
        probe = monitor.probe(torch.ones(3, 5), "ones", regions=True)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        monitor.step()
        window = monitor.close_window()["probes"]
    assert probe.values.isnan().all()
    assert window.local_lipschitz["ones"].mean.count == 0
    for found in (window.regions["ones"].last, window.region_churn["ones"].last):
        assert math.isnan(found.value)
        assert not found.valid


class Noisy(nn.Module):
    """Random in eval mode, from when it is said to be."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.noise = mlp(5, 7, 1), 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + self.noise * torch.randn_like(x) if self.noise else x)


def test_a_model_that_becomes_random_is_not_valid_and_trains_the_same() -> None:
    models = []
    for probed in (False, True):
        model = seeded(Noisy)
        with Monitor(model, optimizer := sgd(model), window_steps=2) as monitor:
            if probed:
                monitor.probe(torch.ones(3, 5), "ones", regions=True)
            model.noise = 0.1
            torch.manual_seed(4)
            train(model, monitor, optimizer)
        models.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))
    window = monitor.history[-1]["probes"]
    for found in (window.local_lipschitz["ones"].mean, window.regions["ones"].last):
        assert (math.isnan(found.value), found.valid) == (True, False)
        assert "draws random numbers" in found.note
    with pytest.raises(ValueError, match="draws random numbers"):
        Monitor(model).probe(torch.ones(3, 5), "again")


def test_a_window_closed_by_a_step_under_autocast() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Monitor(model, optimizer, window_steps=1, metrics=[lipcore.Trajectory()]) as monitor:
        probe = monitor.probe(torch.randn(9, 5), "points")
        with torch.autocast("cpu", torch.bfloat16):
            train(model, monitor, optimizer, 1)
        assert torch.equal(probe.values, local_lipschitz(model, probe.x))


def test_refusals() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    monitor = Monitor(model, sgd(model))
    monitor.probe(torch.ones(1, 5), "one")
    with pytest.raises(ValueError, match="name: there is a probe 'one' already"):
        monitor.probe(torch.ones(1, 5), "one")
    with pytest.raises(ValueError, match="N >= 1"):
        monitor.probe(torch.ones(0, 5), "none")
    with pytest.raises(ValueError, match=r"x: it has NaN or infinity in 1 of 2 rows \(row 1\)"):
        monitor.probe(torch.tensor([[1.0] * 5, [math.nan] * 5]), "nan")
    with pytest.raises(TypeError, match="x: expected a floating tensor"):
        monitor.probe(torch.ones(1, 5, dtype=torch.int64), "integers")
    with pytest.raises(ValueError, match="one value per sample is needed"):
        Monitor(nn.Linear(5, 2), metrics=[lipcore.Trajectory()]).probe(torch.ones(1, 5), "vector")
    with pytest.raises(ValueError, match="not piecewise linear|no ReLU-family"):
        Monitor(nn.Sequential(nn.Linear(5, 1), nn.Tanh())).probe(torch.ones(1, 5), "tanh", regions=True)
    with pytest.raises(TypeError, match="output: expected None, an index, a key or a callable, got 0.5"):
        monitor.probe(torch.ones(1, 5), "name", output=0.5)
    with pytest.raises(TypeError, match="not a dict of modules"):
        Monitor({"a": nn.Linear(1, 1)}).probe(torch.ones(1, 1), "dict")
    # A probe that was refused is not there.
    monitor.step()
    assert list(monitor.close_window()["probes"].local_lipschitz) == ["one"]
    assert math.isfinite(monitor.history[-1]["probes"].local_lipschitz["one"].mean.value)
