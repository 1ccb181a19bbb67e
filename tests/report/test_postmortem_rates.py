"""The post-mortem judges updates without the changes of the learning rate, as the alarms do, and blames no schedule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms.rates import CommonRate
from lipcore.recording import Run, RunRecord, open_run
from lipcore.report.postmortem.account import Account
from lipcore.report.postmortem.causes import checks_of
from lipcore.report.postmortem.rates import log_rates

STEPS, AT = 150, 136
PLACES = ("a", "b", "c")
COSINE = 0.5 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))


def recorded(
    folder: Path,
    rates: np.ndarray,
    *,
    signal: str = "",
    quantity: str = "optimizer/group_lr",
    weights: np.ndarray | None = None,
    scale: float = 0.1,
    gradients: bool = True,
) -> Run:
    """Return a run whose updates are as large as its rates [steps, groups] say; with an alarm in step 136."""
    rng = np.random.default_rng(0)
    names, levels = [*PLACES, "total"], ["group"] * 3 + ["total"]
    noise = np.exp(scale * rng.standard_normal((3, STEPS, 4)))
    grown = np.full((STEPS, 4), 2.0) if weights is None else weights
    arrays = {
        "trajectory/grad_norm": 0.3 * noise[0],
        "trajectory/update_norm": 0.1 * rates[:, :1] * noise[1],
        "trajectory/weight_norm": grown * (1 + 1e-6 * noise[2]),
    }
    arrays["trajectory/grad_norm"][AT - 1, 1] *= 1.8 if signal else 1.0
    if not gradients:
        del arrays["trajectory/grad_norm"]
    record = RunRecord(folder)
    record.begin(0)
    record.add_steps(1, arrays, names, levels)  # type: ignore[arg-type]
    groups = [f"param_groups[{i}]" for i in range(rates.shape[1])] if quantity.startswith("opt") else ["total"]
    record.add_steps(1, {quantity: rates}, groups, ["group" if len(groups) > 1 else "total"] * len(groups))  # type: ignore[arg-type]
    if signal:
        text = f"alarm in step {AT} at b: gradient norm is 1.8 times its usual value (score 7.1, limit 6 x 1)"
        record.add_event(AT, "alarm", text, {"signal": signal, "place": "b", "score": 7.1})
    record.close()
    return open_run(folder)


def of(run: Run, step: int | None = None) -> tuple[Account, str]:
    with run:
        account = run.postmortem(step)
    return account, " ".join(str(account).split())


@pytest.mark.parametrize("quantity", ["optimizer/group_lr", "logged/lr"])
def test_a_schedule_that_ends_is_no_fault_and_a_gradient_that_alarmed_is_not_called_usual(
    tmp_path: Path, quantity: str
) -> None:
    account, text = of(recorded(tmp_path / "a", COSINE[:, None], signal="grad_norm", quantity=quantity))
    assert (account.step, account.begin) == (AT, AT)
    assert [(one.step, one.place, one.what) for one in account.changes] == [(AT, "b", "gradient norm")]
    assert "First: step 136, gradient norm of b, 1." in text
    assert "The gradients were not as usual" in text
    assert "optimizer's state" not in text


def test_rates_that_fall_in_the_last_steps_are_not_asked_about(tmp_path: Path) -> None:
    rates = np.maximum(1e-9, 1 - np.arange(STEPS) / (STEPS - 1)) ** 2
    account, text = of(recorded(tmp_path / "a", rates[:, None]), STEPS)
    assert any(rate.jumped for rate in account.rates)
    assert not account.changes
    assert not checks_of(account)
    assert "Nothing in steps 147 to 150 is beyond what is usual." in text


def test_a_rate_that_jumps_up_is_found(tmp_path: Path) -> None:
    rates = COSINE.copy()
    rates[AT - 1] *= 30
    account, text = of(recorded(tmp_path / "a", rates[:, None]), AT)
    assert (account.begin, {one.place for one in account.at_begin}) == (AT, {"a", "b", "c"})
    assert {one.step for one in account.changes} == {AT}  # and back
    assert " times as large as its gradient explains: the learning rate of param_groups[0] was" in text
    assert "update norm over learning rate of " in text
    assert "How it spread, update norms over the learning rate" in text


def test_one_that_falls_of_one_group_alone_is_seen_in_the_updates(tmp_path: Path) -> None:
    rates = np.stack([np.ones(STEPS), np.ones(STEPS)], axis=1)
    rates[AT - 1 :, 0] = 0.01
    account, text = of(recorded(tmp_path / "a", rates), AT)
    assert account.begin == AT
    assert [rate.group for rate in account.jumps] == ["param_groups[0]"]
    assert "1/100 of the 1 of the step before" in text


def test_what_came_after_the_step_is_not_told_as_its_beginning(tmp_path: Path) -> None:
    account, text = of(recorded(tmp_path / "a", COSINE[:, None], signal="grad_norm"), 130)
    assert account.begin == AT
    assert "Nothing in steps 127 to 130 is beyond what is usual. After the step that was asked for, first: " in text


def test_gradients_that_are_not_recorded_are_not_called_usual(tmp_path: Path) -> None:
    rates = np.ones((STEPS, 2))
    rates[AT - 1, 0] = 30.0
    _, text = of(recorded(tmp_path / "a", rates, gradients=False), AT)
    assert "The updates were not as usual: the learning rate of param_groups[0]" in text
    assert "gradients were as usual" not in text


def test_weights_that_grow_by_usual_updates_have_not_changed_without_one(tmp_path: Path) -> None:
    grown = np.repeat((2 + 0.05 * np.maximum(0, np.arange(STEPS) - 100))[:, None], 4, axis=1)
    account, text = of(recorded(tmp_path / "a", np.ones((STEPS, 1)), weights=grown), AT)
    assert not account.changes
    assert account.begin == AT
    assert "Weights changed without an update" not in text
    grown[AT - 1 :] += 5.0  # written to, by what no update has
    account, text = of(recorded(tmp_path / "b", np.ones((STEPS, 1)), weights=grown), AT)
    assert (account.begin, account.at_begin[0].what) == (AT, "weight norm")
    assert "Weights changed without an update of the optimizer" in text


def test_rates_are_followed_as_by_the_alarms(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rates = np.exp(-0.3 * rng.random((STEPS, 2)).cumsum(0))
    rates[40:44] = 0.0
    rates[60:64, 1] = 0.0

    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}, {"lr": 0.0}])
    common, expected = CommonRate([optimizer]), []
    for row in rates:
        for group, rate in zip(optimizer.param_groups, row, strict=True):
            group["lr"] = float(rate)
        expected.append(common.log_factor())
    with recorded(tmp_path / "a", rates) as run:
        found = log_rates(run, run.step_quantities, 1, STEPS, STEPS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.isnan(found[40:44]).all()


class Wrapper(nn.Module):
    """A model inside, as DDP has it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def test_groups_have_the_names_of_parameters_that_all_else_has(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(Wrapper(model).parameters(), lr=0.1)
    with lipcore.watch(Wrapper(model), optimizer, run=tmp_path / "a", metrics=[lipcore.Trajectory()]):
        for _ in range(3):
            model(torch.ones(5, 3)).sum().backward()
            optimizer.step()
    with open_run(tmp_path / "a") as run:
        assert run.places("group_lr") == ["param_groups[0]: 0.weight to 2.bias"]
