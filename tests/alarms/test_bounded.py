"""What alarms keep is bounded, and what goes wrong in them ends nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import AlarmEvent, Alarms
from lipcore.alarms.samples import SamplesAfter
from lipcore.alarms.unexplained import UnexplainedMovement
from lipcore.per_sample.open_step import MicroBatch


class Norms:
    """What stands for a pass's numbers."""

    def __init__(self, *values: float) -> None:
        self.per_sample = torch.tensor(values, dtype=torch.float64)


def test_learning_rates_of_a_loop_that_logs_nothing_are_not_kept() -> None:
    alarms = Alarms(signals=["loss"])
    alarms._begin([], lambda error: None, lambda: False, has_norms=False)
    for step in range(1, 5000):
        alarms._note_step()
        alarms._begin_step(step)
    assert len(alarms._waiting._log_factors) < 4000


def test_losses_are_looked_at_where_a_trajectory_has_stopped() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trajectory, lipschitz = lipcore.Trajectory(), lipcore.Lipschitz()
    with lipcore.Monitor(model, optimizer, [trajectory, lipschitz], alarms="default") as monitor:
        for step in range(1, 201):
            if step == 50:
                with pytest.warns(RuntimeWarning, match="lipcore stopped recording trajectory: no memory"):
                    monitor._stop_metric(trajectory, RuntimeError("no memory"))
                with pytest.raises(RuntimeError, match="no memory"):
                    monitor.log(loss=1.0)
            monitor.log(loss=100.0 if step == 180 else 1.0 + 0.01 * (step % 7))
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert monitor.alarms is not None
        assert len(monitor.alarms._waiting._steps) < 20
    assert [event.step for event in monitor.alarms.events if event.signal == "loss"] == [180]


def test_what_lasts_is_told_once_where_turns_take_long() -> None:
    finder, turns, found = UnexplainedMovement(1.0), 30, []
    for step in range(1, 121):
        scores = np.array([9.0 if step % turns == 5 else np.nan])
        found.append(finder.step(step, scores, ["a"], turns))
    assert [event.step for event in found if event is not None] == [5]


def switch(steps: int = 2) -> tuple[SamplesAfter, list[object], list[Exception]]:
    told: list[object] = []
    failed: list[Exception] = []
    metric = lipcore.PerSampleGradNorms(loss_reduction="mean")
    after = SamplesAfter(steps, metric, told.append, failed.append)
    after.hear(AlarmEvent(9, "loss", "total", 4.0, ""))
    after.between(9, 9)
    return after, told, failed


def test_a_step_of_too_many_micro_batches_says_so() -> None:
    after, told, _ = switch()
    after.begin_step(10)
    after.step_samples([], "")
    after.between(11, 11)
    assert "of a step with 256 micro-batches or more they are summed up at once" in told[0].message  # type: ignore[attr-defined]


def test_a_sample_of_several_passes_of_a_step_is_named_once() -> None:
    """As those of a closure that LBFGS calls again and again."""
    after, told, _ = switch()
    after.begin_step(10)
    ids = torch.tensor([7, 8])
    passes = [MicroBatch(Norms(9.0 - i, 1.0), ids, None) for i in range(6)]  # type: ignore[arg-type]
    after.step_samples(passes, "")
    after.between(11, 11)
    largest = told[0].largest  # type: ignore[attr-defined]
    assert [(one.id, one.norm) for one in largest] == [(7, 9.0), (8, 1.0)]


def test_passes_that_were_not_recorded_are_told_beside_those_that_were() -> None:
    after, told, _ = switch()
    after.begin_step(10)
    after.step_samples([MicroBatch(Norms(1.0, 3.0), None, None)], "")  # type: ignore[arg-type]
    after._metric._without_loss["its loss is not known"] += 1
    after.between(11, 11)
    assert told[0].doubt == "others were not recorded: its loss is not known"  # type: ignore[attr-defined]
    assert "row 1 in step 10" in told[0].message  # type: ignore[attr-defined]


def test_what_goes_wrong_as_samples_are_read_ends_the_metric_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("no memory")

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean")
    alarms = Alarms(signals=["loss"], per_sample=2)
    monkeypatch.setattr("lipcore.alarms.samples._largest", full)
    with (
        pytest.warns(RuntimeWarning, match="^lipcore turned per_sample_grad_norm off: no memory"),
        lipcore.Monitor(model, optimizer, [lipcore.Trajectory(), norms], alarms=alarms, window_steps=4) as monitor,
    ):
        for step in range(1, 9):
            monitor.log_batch([step, step] if step == 2 else [2 * step, 2 * step + 1], epoch=0)
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
    assert [window.last_step for window in monitor.history] == [4, 8]
    assert not model[0]._forward_hooks


def test_a_metric_that_looks_at_some_steps_alone_is_refused() -> None:
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", every_steps=4)
    with pytest.raises(ValueError, match=r"^alarms: per_sample= measures every step .* one of 4; make it with every_"):
        lipcore.Monitor(nn.Linear(2, 1), metrics=[lipcore.Trajectory(), norms], alarms=Alarms(per_sample=2))
