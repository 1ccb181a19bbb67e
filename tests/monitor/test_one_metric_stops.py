"""An error of one metric stops that metric, with its own cause; the others go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Metric, Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric import MetricResult, Needs, Value


class Failing(Metric):
    """Counts steps, and fails where it is told to."""

    name = "failing"

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step, self.steps = where, step, 0

    def bind(self, model: nn.Module) -> None: ...

    def needs(self) -> Needs:
        return Needs(gradients=True, used_gradients=True)

    def plan(self) -> list[Any]:
        return []

    def _here(self, where: str) -> None:
        if where == self.where and self.steps + 1 >= self.step:
            raise ValueError(f"no luck in {where}")

    def observe_gradients(self) -> None:
        self._here("observe_gradients")

    def observe_used_gradients(self, optimizer: Any) -> None:
        self._here("observe_used_gradients")

    def observe_step(self) -> None:
        self._here("observe_step")
        self.steps += 1

    def finalize(self) -> MetricResult:
        result = MetricResult(self.name)
        result.add("steps", "total", "total", sum=Value(float(self.steps), self.steps))
        return result

    def reset(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def training(metrics: list[Metric], window_steps: int = 4) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, metrics, window_steps=window_steps)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()

    return monitor, run, model


@pytest.mark.parametrize("where", ["observe_gradients", "observe_used_gradients", "observe_step"])
@pytest.mark.parametrize("first", [True, False])
def test_the_others_go_on(where: str, first: bool) -> None:
    others: list[Metric] = [Trajectory(), Lipschitz(), PerSampleGradNorms(loss_reduction="mean")]
    failing = Failing(where, 3)
    monitor, run, _ = training([failing, *others] if first else [*others, failing])
    with pytest.warns(RuntimeWarning, match=f"lipcore stopped recording failing: no luck in {where}"):
        run(10)
    with pytest.raises(ValueError, match=f"no luck in {where}"):
        monitor.flush()
    monitor.flush()  # once
    early, late = monitor.history
    assert early["failing"].steps["total"].sum.value == 2
    assert early.off["failing"] == f"stopped recording in step 3: no luck in {where}"
    assert "failing" not in late
    assert "no luck" in repr(late)
    for window in monitor.history:
        assert window["trajectory"].update_norm["total"].mean.count == 4
        assert next(iter(window["lipschitz"].normalized_gradient_norm.values())).mean.count == 20
        assert window["per_sample_grad_norm"].norm["total"].mean.count == 20
    failing.where = "nowhere"
    monitor.rebind()
    run(4)
    assert monitor.history[-1]["failing"].steps["total"].sum.value == 4
    assert not monitor.history[-1].off
    monitor.close()


def test_per_sample_norms_of_a_stopped_metric_are_not_those_of_an_earlier_batch() -> None:
    norms = PerSampleGradNorms(loss_reduction="mean")
    monitor, run, model = training([Trajectory(), norms])
    run(2)
    assert norms.per_sample.isfinite().all()
    norms.set_ids([1, 2])  # of five samples
    with pytest.warns(RuntimeWarning, match=r"stopped recording per_sample_grad_norm: ids: 2 ids"):
        run(1)
    with pytest.raises(ValueError, match="ids: 2 ids"):
        monitor.flush()
    assert norms.per_sample.isnan().all()
    assert "ids: 2 ids were given for a micro-batch of 5 samples" in norms.broken
    run(3)
    assert norms.per_sample.isnan().all()
    assert monitor.history[-1]["trajectory"].update_norm["total"].mean.count == 4
    monitor.rebind()
    run(1)
    assert norms.per_sample.isfinite().all()
    assert not norms.broken
    monitor.close()
    del model


def test_a_clock_that_stops_stops_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    one, other = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
    monitor = Monitor(model, [one, other], metrics)
    with pytest.warns(RuntimeWarning, match="lipcore stopped recording: optimizer: SGD has stepped twice"):
        for _ in range(2):
            model(torch.randn(2, 3)).square().mean().backward()
            one.step()
    with pytest.raises(ValueError, match="stepped twice"):
        monitor.compute()
    monitor.close()


def test_passes_of_the_proof_are_not_told_as_the_users() -> None:
    monitor, run, _ = training([Lipschitz(), PerSampleGradNorms(loss_reduction="mean")])
    run(3)
    window = monitor.compute()
    assert window["lipschitz"].details.get("unrecorded_because", []) == []
    assert window["lipschitz"].details["unrecorded_forwards"] == 0
    monitor.close()
