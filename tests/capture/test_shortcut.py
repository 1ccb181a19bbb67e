"""Batches of one: the shortcut brings what the taps bring, and the taps what autograd brings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from models import adam, batches, mlp, reference, seeded, sgd, train
from scenarios import SCENARIOS, TRACKED, Stumbling, penalty_on_parameters, plain, two_forwards_one_backward
from threads import at_once
from torch import Tensor, nn
from torch.nn.utils import prune
from windows import assert_same, ratios_of, served

from lipcore import Lipschitz, Monitor, local_lipschitz
from lipcore.metric.results import Window


def chain_of_three(name: str) -> nn.Sequential:
    if name == "stumbling":
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), Stumbling(), nn.Linear(7, 1))
    return mlp(5, 7, 6, 1)


def run_scenario(
    name: str,
    optimizer_of: Callable[..., Any],
    expect: Callable[[nn.Module, Tensor], None] | None = None,
    **settings: Any,
) -> Window:
    model = seeded(lambda: chain_of_three(name), dtype=torch.float64)
    optimizer = optimizer_of(model)
    with Monitor(model, optimizer, metrics=[Lipschitz(**settings)]) as monitor:
        for step, (x, y) in enumerate(batches(10, 1)):
            if expect is not None:
                expect(model, x.double())
            SCENARIOS[name](model, optimizer, x.double(), y.double(), step)
        return monitor.compute()


@pytest.mark.parametrize("optimizer_of", [sgd, adam], ids=["momentum_decay", "adam"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_shortcut_brings_what_the_taps_bring(name: str, optimizer_of: Callable[..., Any]) -> None:
    shortcut, taps = (run_scenario(name, optimizer_of, batch_of_one=yes) for yes in ("fast", "exact"))
    assert ratios_of(taps)[0] > 0
    assert ratios_of(shortcut) == pytest.approx(ratios_of(taps), rel=1e-12)
    assert_same(shortcut, taps)


@pytest.mark.parametrize("name", TRACKED)
def test_the_taps_bring_what_autograd_brings(name: str) -> None:
    r, lambdas = [], []

    def expect(model: nn.Module, x: Tensor) -> None:
        bare = chain_of_three("plain").double()
        if name == "stumbling":
            bare = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Identity(), nn.Linear(7, 1)).double()
        linear = [m for m in model if isinstance(m, nn.Linear)]
        for mine, theirs in zip([m for m in bare if isinstance(m, nn.Linear)], linear, strict=True):
            pruned = hasattr(theirs, "weight_orig")  # its weight is made anew in every forward pass
            mine.weight.data.copy_(theirs.weight_orig * theirs.weight_mask if pruned else theirs.weight)
            mine.bias.data.copy_(theirs.bias)
        if name == "weight_pruned" and len(r) == 3:
            prune.l1_unstructured(bare[0], "weight", 0.3)
            prune.remove(bare[0], "weight")
        if name == "weight_parametrized" and len(r) == 3:
            bare[0].weight.data.tanh_()
        if name == "bias_replaced" and len(r) == 2:
            bare[0].bias.data.add_(1)
        found = reference(bare, x)
        r.append(float(found[0]))
        lambdas.append(float(found[1]))

    window = run_scenario(name, sgd, expect, batch_of_one="exact")
    count, total, mean = ratios_of(window)
    assert count == 10
    assert total == pytest.approx(sum(r), rel=1e-12)
    assert mean == pytest.approx(sum(lambdas) / 10, rel=1e-12)


def test_the_shortcut_is_taken_where_it_can_be() -> None:
    model = seeded(lambda: mlp(5, 7, 6, 1))
    optimizer = sgd(model)
    with Monitor(model, optimizer, metrics=[Lipschitz(batch_of_one="fast")]) as monitor:
        train(model, batches(5, 1), optimizer)
        assert served(monitor) == 4  # the first one is tapped too, to see that both bring the same
        assert not model[0]._forward_hooks
        train(model, batches(2, 4), optimizer)
        assert served(monitor) == 4
        train(model, batches(60, 1), optimizer)
        assert served(monitor) == 64
        assert ratios_of(monitor.compute())[0] == 73
        train(model, batches(200, 1), optimizer)
        assert served(monitor) == 263  # the 257th was checked too


@pytest.mark.parametrize("scenario", few(["late_penalty", "two_forwards_late"], 1))
def test_a_loop_that_changes_is_found_out_within_256_steps(scenario: str) -> None:
    late = penalty_on_parameters if scenario == "late_penalty" else two_forwards_one_backward
    model = seeded(lambda: mlp(5, 7, 6, 1))
    twin = seeded(lambda: mlp(5, 7, 6, 1))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    with (
        Monitor(model, optimizers[0], metrics=[Lipschitz(batch_of_one="fast")], window_steps=None) as monitor,
        Monitor(twin, optimizers[1], metrics=[Lipschitz(batch_of_one="exact")], window_steps=None) as taps,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for step, (x, y) in enumerate(batches(400, 1)):
            for watched, optimizer in zip((model, twin), optimizers, strict=True):
                (plain if step < 70 else late)(watched, optimizer, x, y, step)
            if step in (69, 340):
                window, expected = monitor.close_window(), taps.close_window()
                if step == 69:
                    assert ratios_of(window) == pytest.approx(ratios_of(expected), rel=1e-9)
        assert ratios_of(monitor.compute()) == pytest.approx(ratios_of(taps.compute()), rel=1e-9)
    if scenario == "late_penalty":
        assert ["more than the loss of one sample" in str(w.message) for w in caught] == [True]
    else:
        assert window["lipschitz"].details["unrecorded_forwards"] == 1  # the one that gave it away


def reshaping() -> nn.Sequential:
    # The last layer sees two rows of one sample: its bias gradient adds them up.
    return nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 1))


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "taps"])
def test_a_chain_with_several_values_per_sample_is_refused_at_batch_one(shortcut: bool) -> None:
    model = seeded(reshaping)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match=r"shape \[1, 2, 1\]"),
        Monitor(model, metrics=[Lipschitz(batch_of_one="fast" if shortcut else "exact", quantity="scalar")]),
    ):
        model(torch.randn(1, 5)).square().sum().backward()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 1), nn.Flatten(), nn.Linear(2, 1)),
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Softmax(dim=1), nn.LayerNorm(6), nn.Dropout(0.0), nn.Linear(6, 1)),
        lambda: nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 1)),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.ReLU()), nn.Sequential(nn.Tanh(), nn.Linear(6, 1))),
    ],
    ids=["rows_inside", "softmax_layernorm", "two_layers", "nested"],
)
def test_shortcut_on_unusual_chains(build: Callable[[], nn.Module]) -> None:
    model = seeded(build, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    first = "0.0" if isinstance(model[0], nn.Sequential) else "0"
    expected_r, expected_lambda = reference(model, x, first=first)
    for shortcut in (True, False):
        model.zero_grad()
        with Monitor(model, metrics=[Lipschitz(batch_of_one="fast" if shortcut else "exact")]) as monitor:
            for row in x.split(1):
                model.zero_grad()
                model(row).square().sum().backward()
                monitor.step()
            count, total, mean = ratios_of(monitor.compute())
        assert count == 3
        assert total == pytest.approx(float(expected_r.sum()), rel=1e-12)
        assert mean == pytest.approx(float(expected_lambda.mean()), rel=1e-12)


@pytest.mark.parametrize("order", ["together", "batch first", "sample first"])
def test_a_batch_that_has_not_come_back_keeps_the_next_sample_from_being_served(order: str) -> None:
    """Both would add to the biases' gradients that a served sample is read from."""
    model = seeded(lambda: mlp(5, 7, 6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (batch, _), (sample, _) = *batches(1, 3), *batches(1, 1)
    with Monitor(model, optimizer, metrics=[Lipschitz(batch_of_one="fast")]) as monitor:
        train(model, batches(4, 1), optimizer)
        assert served(monitor) == 3
        monitor.close_window()
        of_batch, of_sample = model(batch).sum(), model(sample).sum()
        if order == "together":
            (of_batch + of_sample).backward()
        else:
            for loss in (of_batch, of_sample) if order == "batch first" else (of_sample, of_batch):
                loss.backward()
        optimizer.step()
        found = monitor.close_window()["lipschitz"].local_lipschitz["model:Linear"]
        train(model, batches(1, 1), optimizer)
        assert served(monitor) == 4  # and serves again
    expected = local_lipschitz(model, torch.cat([batch, sample]))
    assert found.mean.count == 4
    assert found.mean.value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found.max.value == pytest.approx(float(expected.max()), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_one_model_trained_by_several_threads(size: int) -> None:
    """As Hogwild does: nothing is raised inside a forward pass, and no sample's number is another's."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = mlp(5, 4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        xs = [torch.randn(size, 5) for _ in range(3)]

        def work(x: Tensor, model: nn.Module = model) -> None:
            for _ in range(40):
                model(x).square().sum().backward()

        with Monitor(model, optimizer, metrics=[Lipschitz(batch_of_one="fast")]) as monitor:
            train(model, [(xs[0][:1], torch.zeros(1, 1))] * (seed % 3), optimizer)
            monitor.close_window()
            at_once(work, xs)
            optimizer.step()
            found = monitor.close_window()["lipschitz"].local_lipschitz["model:Linear"]
        expected = torch.cat([local_lipschitz(model, x) for x in xs])
        assert found.mean.count >= 100 * size
        assert found.min.value >= float(expected.min()) * (1 - 1e-5)
        assert found.max.value <= float(expected.max()) * (1 + 1e-5)
