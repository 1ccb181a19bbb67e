"""What is not proved of an open window stays so over a checkpoint, whatever the run that goes on from it proves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms
from lipcore.per_sample.doubts import Doubts, added_doubts

NOT_ASKED = "prove=False was passed"


def made(prove: bool) -> tuple[nn.Module, Any, Monitor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [PerSampleGradNorms(loss_reduction="mean", prove=prove)]
    return model, optimizer, Monitor(model, optimizer, metrics, window_steps=3)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_window_that_was_half_unproved_is_heuristic_and_the_next_one_exact() -> None:
    model, optimizer, monitor = made(prove=False)
    train(model, optimizer, 2)
    state = monitor.state_dict()
    monitor.close()
    model, optimizer, monitor = made(prove=True)
    monitor.load_state_dict(state)
    with monitor:
        train(model, optimizer, 4)
    first, second = (window["per_sample_grad_norm"] for window in monitor.history)
    assert first.norm["total"].mean.label == "heuristic"
    assert first.norm["total"].mean.count == 15
    assert first.details["not_proved"] == {NOT_ASKED: 2}
    assert second.norm["total"].mean.label == "exact"


def test_a_state_without_them_loads_and_one_with_others_is_named() -> None:
    _, _, monitor = made(prove=True)
    metric: Any = monitor.metrics["per_sample_grad_norm"]
    state = metric.state_dict()
    metric.load_state_dict({key: value for key, value in state.items() if key not in ("doubts", "taken_back")})
    for wrong in ([{"why": -1}], {"why": 1}, [{}, {}]):
        with pytest.raises(ValueError, match="doubts: expected reasons with counts, by block"):
            metric.load_state_dict({**state, "doubts": wrong})


def test_doubts_of_ranks_add_up_block_by_block() -> None:
    assert added_doubts([]) == []
    assert added_doubts([[{"a": 1}, {"b": 1}], [{"b": 2, "c": 3}], []]) == [{"a": 1}, {"b": 3, "c": 3}]
    doubts = Doubts(2)
    doubts.load([{"a": 1}, {"b": 2}])
    doubts.advance()
    assert doubts.counts() == {"b": 2}


def test_what_lipschitz_has_not_compared_stays_so() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    metric = Lipschitz(model)
    model(torch.randn(5, 4)).square().mean().backward()
    metric.update()
    metric._at_input.unproved = "not compared"
    state = metric.state_dict()
    assert state["doubt"] == "not compared"
    other = Lipschitz(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))
    other.load_state_dict(other.add_states(other.empty_state(state), [state]))
    assert other._doubt == "not compared"
    other.reset()
    assert other._doubt == ""
    with pytest.raises(ValueError, match="doubt: expected words, got 3"):
        other.load_state_dict({**state, "doubt": 3})
