"""Sudden changes of a layer's updates: planted ones are found with their step; training as it should be has none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.report.binned import Binned
from lipcore.report.checks import checks_of
from lipcore.report.facts import Facts, facts_of
from lipcore.report.ratio_map import RatioMap
from lipcore.report.sudden import most_sudden

BINS = np.arange(400)


def noise(rows: int = 3, spread: float = 0.1, seed: int = 0) -> Any:
    return np.exp(spread * np.random.default_rng(seed).standard_normal((len(BINS), rows)))


def test_a_spike_of_one_layer_and_of_all() -> None:
    high = noise()
    high[200, 1] *= 30
    found = most_sudden(high)
    assert found is not None
    assert (found.bin, found.row, found.shared) == (200, 1, False)
    assert 10**found.log == pytest.approx(30, rel=0.5)
    high[300] *= 100
    found = most_sudden(high)
    assert found is not None
    assert (found.bin, found.shared) == (300, True)


@pytest.mark.parametrize(("factor", "log"), [(1e-2, -2.0), (0.0, -np.inf)])
def test_a_layer_that_hardly_moves_any_more(factor: float, log: float) -> None:
    high = noise()
    high[150:, 2] *= factor
    found = most_sudden(high)
    assert found is not None
    assert (found.bin, found.row) == (150, 2)
    assert found.log == pytest.approx(log, abs=0.3)


@pytest.mark.parametrize(
    "factors",
    [
        np.minimum(1, (BINS + 1) / 50),  # a warm-up
        np.exp(-BINS / 6),  # updates become smaller from the beginning on
        np.where(BINS < 10, 50.0, 1.0),  # the first steps of Adam
        np.where(BINS == 200, 1e-3, 1.0),  # a step that is small by chance
        np.cos(BINS / 400 * np.pi / 2),
    ],
    ids=["warm-up", "decay", "beginning", "small", "cosine"],
)
@pytest.mark.parametrize("row", [0, slice(None)], ids=["one layer", "all"])
def test_training_as_it_should_be(factors: Any, row: Any) -> None:
    high = noise()
    high[:, row] *= factors[:, None] if isinstance(row, slice) else factors
    assert most_sudden(high) is None


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_learning_rate_that_is_divided_by_a_hundred(rows: int) -> None:
    """What all layers do is not said of one; of a single layer it is not known, and not said."""
    high = noise(rows)
    high[250:] *= 0.01
    assert most_sudden(high) is None


def test_what_is_usual_has_to_be_known() -> None:
    assert most_sudden(np.full((400, 2), np.nan)) is None
    assert most_sudden(noise()[:15] * np.where(BINS[:15] == 10, 100, 1)[:, None]) is None
    high = noise(2, spread=1.5)  # ten times is nothing here
    assert most_sudden(high) is None


def test_nothing_is_found_in_noise() -> None:
    found = 0
    for seed in range(20):
        values = np.exp(0.15 * np.random.default_rng(seed).standard_t(5, (400, 6)))
        found += most_sudden(values) is not None
    assert found <= 2


def trained(run: Path, steps: int, fault: int = 0) -> list[Any]:
    """Return the checks of a run with Adam, whose last layer's rate is 50 times as large in one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    groups = [{"params": layer.parameters()} for layer in model[::2]]
    optimizer = torch.optim.Adam(groups, lr=3e-3)
    with lipcore.watch(model, optimizer, run=run, metrics=[lipcore.Trajectory()]) as monitor:
        for step in range(1, steps + 1):
            x = torch.randn(32, 4)
            loss = (model(x)[:, 0] - x[:, 0].sin()).square().mean()
            monitor.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            groups[2]["lr"] = 0.15 if step == fault else 3e-3
            optimizer.step()
    with lipcore.open_run(run) as read:
        facts = facts_of(read)
    assert facts.ratios is not None
    return checks_of(facts, RatioMap(facts.ratios, facts))


def test_a_run_of_adam_that_learns_needs_no_attention(tmp_path: Path) -> None:
    assert [check.text for check in trained(tmp_path / "a", 400) if check.state == "fired"] == []


def test_a_fault_in_a_run_of_adam_is_told_with_step_and_layer(tmp_path: Path) -> None:
    (fired,) = [check.text for check in trained(tmp_path / "a", 320, fault=300) if "Sudden" in check.name]
    assert fired.startswith("Step 300, layer 4: the update over the weight norm is ")


def check_of(high: Any, name: str = "Sudden changes") -> Any:
    """Return a check of updates over weight norms, [steps, layers]."""
    ratios = Binned(1, len(high), 1000)
    ratios.add(np.arange(1, len(high) + 1), [f"l{i}" for i in range(high.shape[1])], high)
    facts = Facts("x", "x")
    (found,) = [one for one in checks_of(facts, RatioMap(ratios, facts)) if one.name == name]
    return found


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (160, "Step 151, l1: from here to step 160 it does not move."),
        (400, "Step 151, l1: from here on it does not move."),
    ],
)
def test_a_layer_that_stops_is_said_to_do_so_for_as_long_as_it_does(end: int, said: str) -> None:
    high = noise()
    high[150:end, 1] = 0.0
    assert check_of(high).text == said


def test_what_was_compared_with_nothing_is_not_said_to_be_quiet() -> None:
    high = noise()[:20]
    high[11, 1] *= 1000
    check = check_of(high)
    assert (check.state, check.remedy) == ("not measured", "train for more than 20 steps")
    assert check_of(high[:1]) == check
    high = noise()[:60]
    high[14, 1] *= 1000
    high[:30, 2] = 0.0  # it moves from step 31 on
    check = check_of(high)
    assert check.state == "quiet"
    assert check.text.startswith("From step 51 on, no layer's update over weight norm became ten times larger")
    high[5:, 2] = 0.0
    check = check_of(high)
    assert check.text.startswith("From step 21 on")
    assert check.text.endswith(" 1 layer moved in too few steps to be compared.")


@pytest.mark.parametrize(
    ("losses", "state", "said"),
    [
        ([0.4714], "not measured", "The loss is 0.471 in all that was logged"),
        ([0.4714, 0.4712], "quiet", "The loss hardly fell: it went from 0.471 to 0.471"),
        ([0.4714, 0.3], "quiet", "The loss fell from 0.471 to 0.3"),
    ],
)
def test_a_loss_that_did_not_fall_is_not_said_to(losses: list[float], state: str, said: str) -> None:
    facts, line = Facts("x", "x"), Binned(1, len(losses), 10)
    line.add(np.arange(1, len(losses) + 1), ["total"], np.array(losses)[:, None])
    facts.lines["logged/loss"] = line
    (check,) = [one for one in checks_of(facts, None) if one.name == "The loss"]
    assert check.state == state
    assert check.text.startswith(said)


def test_the_map_says_of_layers_alone_what_is_furthest() -> None:
    high = noise()
    ratios = Binned(1, len(high), 1000)
    ratios.add(BINS + 1, ["a", "b", "c"], high)
    facts = Facts("x", "x")
    data = {"signal": "nonfinite", "rank": 1}
    facts.events.append(
        SimpleNamespace(step=200, kind="alarm", text="alarm in step 200: not finite: the loss", data=data)
    )
    assert "Furthest from the steps before: " in str(RatioMap(ratios, facts)._sentence())
    (check,) = [one for one in checks_of(facts, None) if one.name == "Alarms"]
    told = "told by rank 1); what is below is not of that rank, --rank 1 shows it"
    assert check.text == f"1 alarm in step 200: not finite: the loss ({told}"
