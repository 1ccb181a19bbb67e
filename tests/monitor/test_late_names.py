"""What a loop says of a step (loss, samples, rates) is of that step where steps are read late, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import Alarms

STEPS = 12


def train(folder: Path, *, after: bool = False) -> tuple[dict[str, list[Any]], lipcore.Monitor]:
    """Train with weights that shrink after every step, which is seen after the first; in step 9 a sample comes twice.
    Return what the loop knows of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)
    reduction = "mean" if after else "auto"  # which reads the loss that is logged before the backward pass
    norms = lipcore.PerSampleGradNorms(loss_reduction=reduction, noise_scale=False)
    known: dict[str, list[Any]] = {name: [] for name in ("loss", "rate", "ids", "losses")}
    with (
        pytest.warns(RuntimeWarning, match="From now on a step is read when the next backward pass begins"),
        lipcore.watch(
            model,
            optimizer,
            metrics=[lipcore.Trajectory(mode="exact"), norms],
            alarms=Alarms(signals=["loss"]),
            run=folder,
            window_steps=5,
        ) as monitor,
    ):
        for step in range(1, STEPS + 1):
            each = model(torch.randn(3, 3))[:, 0].square()
            loss = each.mean()
            ids = 10 * step + torch.arange(3)
            if step == 9:
                ids[1] = ids[0]
            if not after:
                monitor.log(loss=loss)
            monitor.log_batch(ids, losses=each, epoch=0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            known["rate"].append(optimizer.param_groups[0]["lr"])
            with torch.no_grad():
                model[0].weight.mul_(0.9)
            schedule.step()
            if after:
                monitor.log(loss=loss)
            known["loss"].append(loss.item())
            known["ids"].append(ids.tolist())
            known["losses"].append(each.tolist())
        assert monitor._step_end.late
    return known, monitor


@pytest.mark.parametrize("after", [False, True])
def test_the_record_has_them_at_their_steps(tmp_path: Path, after: bool) -> None:
    known, monitor = train(tmp_path / "a", after=after)
    assert monitor.alarms is not None
    assert [event.step for event in monitor.alarms.events] == [9]
    with lipcore.open_run(tmp_path / "a") as run:
        loss = run.series("loss")
        assert loss.steps.tolist() == list(range(1, STEPS + 1))
        assert loss["total"].tolist() == pytest.approx(known["loss"], rel=1e-6)
        rates = run.series("group_lr")
        assert rates.steps.tolist() == list(range(1, STEPS + 1))
        assert rates.values[:, 0].tolist() == pytest.approx(known["rate"], rel=1e-6)
        batches = run.batches()
        assert [batch.step for batch in batches] == list(range(1, STEPS + 1))
        for batch, ids, losses in zip(batches, known["ids"], known["losses"], strict=True):
            assert batch.ids is not None
            assert batch.losses is not None
            assert batch.norms is not None
            assert batch.ids.tolist() == ids
            assert batch.losses.tolist() == pytest.approx(losses, rel=1e-6)


def test_metrics_of_single_samples_have_the_names_of_their_own_pass(tmp_path: Path) -> None:
    known, monitor = train(tmp_path / "a")
    norms: Any = monitor.metrics["per_sample_grad_norm"]
    ids = sorted({one for each in known["ids"] for one in each})
    assert len(norms.scores) == len(norms.loss_scores) == len(ids) == 3 * STEPS - 1
    assert norms.loss_scores.lookup([122]).mean.item() == pytest.approx(known["losses"][-1][2], rel=1e-6)
    counts = [window["per_sample_grad_norm"].norm["total"].mean.count for window in monitor.history]
    assert counts == [15, 15]
    assert all(window["per_sample_grad_norm"].norm["total"].mean.valid for window in monitor.history)


def test_windows_have_what_was_logged_of_their_own_steps(tmp_path: Path) -> None:
    known, monitor = train(tmp_path / "a")
    for window in monitor.history:
        mean = window["logged"].loss["total"].mean
        own = known["loss"][window.first_step - 1 : window.last_step]
        assert (mean.count, mean.note) == (5, "")
        assert mean.value == pytest.approx(sum(own) / 5, rel=1e-6)


def test_the_rate_that_alarms_take_out_of_updates_is_that_of_the_step() -> None:
    """A schedule that falls to a hundredth is no alarm, nor is the step before it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 130, 0.01)
    alarms = Alarms(signals=["update_norm"])
    x, y = torch.randn(64, 3), torch.randn(64, 1)
    with (
        pytest.warns(RuntimeWarning, match="From now on a step is read when the next backward pass begins"),
        lipcore.Monitor(model, optimizer, [lipcore.Trajectory(mode="exact")], alarms=alarms),
    ):
        for _ in range(160):
            (model(x) - y).square().mean().backward()
            for parameter in model.parameters():  # of one size, whatever the weights are
                assert parameter.grad is not None
                parameter.grad.div_(parameter.grad.norm())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.bias.add_(1e-6)
            schedule.step()
    assert alarms.events == []


def test_what_is_said_when_nothing_is_measured_any_more_is_not_kept() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = lipcore.watch(model, optimizer, metrics=[lipcore.Trajectory()])
    monitor.log(loss=1.0)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    monitor.close()
    before = len(monitor._logged._window)
    for _ in range(3):
        monitor.log(loss=1.0)
    assert len(monitor._logged._window) == before


def test_an_error_in_a_monitor_without_metrics_is_raised_too() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (one, other)]
    monitor = lipcore.Monitor({"a": one, "b": other}, optimizers, [], alarms=Alarms(signals=["loss"]))
    one(torch.ones(1, 1)).sum().backward()
    with pytest.warns(RuntimeWarning, match="stopped recording: optimizer: SGD has stepped twice"):
        for _ in range(2):
            optimizers[0].step()
    with pytest.raises(ValueError, match="^optimizer: SGD has stepped twice"):
        monitor.log(loss=1.0)
    monitor.close()
