"""States say which ranks saved them, and of how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from states import opened, sealed
from torch import nn

import lipcore
from lipcore.metric.state import checked_lacking


def train(steps: int, state: Any = None) -> lipcore.Monitor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    metrics = [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="mean")]
    monitor = lipcore.Monitor(model, metrics=metrics, window_steps=4)
    if state is not None:
        monitor.load_state_dict(state)
    for _ in range(steps):
        step(monitor)
    return monitor


def step(monitor: Any) -> None:
    monitor.model(torch.randn(5, 3)).square().mean().backward()
    monitor.step()


def of_rank(state: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """What another rank would have written by itself."""
    return sealed(opened(state), rank, ranks)


def of_ranks(*states: dict[str, Any]) -> dict[str, Any]:
    """What one process reads of a checkpoint that several ranks have saved together."""
    parts = [of_rank(state, rank, len(states)) for rank, state in enumerate(states)]
    return {**parts[0], "ranks": {key: entry for part in parts for key, entry in part["ranks"].items()}}


@pytest.mark.filterwarnings("ignore:PerSampleGradNorms:UserWarning")
def test_samples_of_another_rank_are_left_out() -> None:
    state = of_rank(train(2).state_dict(), 1, 3)
    with pytest.warns(RuntimeWarning, match="per_sample_grad_norm: rank 0 of 1 goes on from the state of rank 1 of 3"):
        monitor = train(1, state)
    open_one = monitor.compute()
    step(monitor)
    for result, steps in ((open_one, 3), (monitor.pop_window(), 4)):
        assert result is not None
        assert result["trajectory"].path_length["total"].sum.count == steps
        assert "per_sample_grad_norm" not in result
        assert "goes on from the state of rank 1 of 3" in result.off["per_sample_grad_norm"]
    step(monitor)
    assert monitor.compute()["per_sample_grad_norm"].norm["total"].mean.count == 5


def test_samples_of_all_ranks_are_there(recwarn: pytest.WarningsRecorder) -> None:
    state = train(2).state_dict()
    state = of_ranks(state, state, state)
    recwarn.clear()
    result = train(1, state).compute()
    assert not recwarn
    assert result["trajectory"].path_length["total"].sum.count == 3
    assert result["per_sample_grad_norm"].norm["total"].mean.count == 3 * 10 + 5


@pytest.mark.parametrize("steps", [4, 8])
def test_nothing_is_left_out_of_a_window_that_has_just_begun(steps: int, recwarn: pytest.WarningsRecorder) -> None:
    state = of_rank(train(steps).state_dict(), 0, 2)
    recwarn.clear()
    monitor = train(1, state)
    assert not recwarn
    assert monitor.compute()["per_sample_grad_norm"].norm["total"].mean.count == 5


def test_ones_own_state_goes_on(recwarn: pytest.WarningsRecorder) -> None:
    state = train(2).state_dict()
    recwarn.clear()
    assert train(1, state).compute()["per_sample_grad_norm"].norm["total"].mean.count == 15
    assert not recwarn


def test_what_windows_lack_is_that_of_all_ranks_that_one_goes_on_from() -> None:
    entries = [{"lacking": {"a": [3, "of 3"]}}, {"lacking": {"a": [5, "of 5"], "b": [2, "of 2"]}}, {"metrics": {}}]
    assert checked_lacking(entries) == {"a": (5, "of 5"), "b": (2, "of 2")}
    assert checked_lacking(entries[2:]) is None  # of an earlier lipcore
    for wrong in ([], {"a": 3}, {"a": [3]}, {"a": ["3", "why"]}, {"a": [3, None]}):
        with pytest.raises(ValueError, match="lacking"):
            checked_lacking([{"lacking": wrong}])
