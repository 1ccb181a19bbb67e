"""Windows of all ranks that are longer than the ring: nothing is lost, or the window is left out by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rank_runs import Found, run_situations

from lipcore.trajectory import kept_steps
from lipcore.trajectory.kept_steps import KeptSteps


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    return run_situations(tmp_path_factory.mktemp("ranks"), "long_situations", 2)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["long_window", "loaded_in_the_middle"])
def test_a_window_longer_than_the_ring(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert not numbers["absent"]
        assert numbers["error"] <= 1e-7


@pytest.mark.ci
def test_steps_that_are_gone(found: Found) -> None:
    for numbers in found["steps_that_are_gone"]:
        assert isinstance(numbers, dict), numbers
        assert re.search(r"ring: the window has 520 steps, the ring keeps 512, .* Use ring=520", numbers["said"])


def filled(steps: int, ring: torch.Tensor, kept: KeptSteps) -> torch.Tensor:
    """Steps of a run whose ring is absorbed every 8 of them, [steps, rows, 2]."""
    values = torch.arange(steps * 6, dtype=torch.float64).reshape(steps, 3, 2)
    for step in range(steps):
        ring[step % len(ring)] = values[step]
        if (step + 1) % 8 == 0:
            kept.add(ring, step - 7, step + 1)
    return values


def test_steps_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_steps, "world_size", lambda: 2)
    ring, kept = torch.zeros(10, 3, 2, dtype=torch.float64), KeptSteps(2)
    values = filled(29, ring, kept)
    for begin, end in ((0, 29), (3, 29), (20, 29), (28, 29), (29, 29)):
        assert torch.equal(kept.window(ring, begin, end), values[begin:end, :2])
    assert kept.window(ring, 0, 29) is None  # what a later window has no use for is dropped
    kept.clear()
    assert kept.window(ring, 18, 29) is None
    assert torch.equal(kept.window(ring, 19, 29), values[19:, :2])


def test_steps_before_the_ring_are_in_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_steps, "world_size", lambda: 2)
    ring, kept = torch.zeros(10, 3, 2, dtype=torch.float64), KeptSteps(2)
    values = filled(29, ring, kept)
    state = kept.state(19)
    assert state["begin"] == 0
    assert torch.equal(state["steps"], values[:19, :2])
    other = KeptSteps(2)
    other.load(*other.checked(state), ring.device)
    assert torch.equal(other.window(ring, 3, 29), values[3:29, :2])
    assert not len(KeptSteps(2).state(19)["steps"])
    for wrong in ({}, {"begin": -1, "steps": values}, {"begin": 0, "steps": values}):
        with pytest.raises(ValueError, match="expected"):
            other.checked(wrong)


def test_one_process_keeps_nothing_beside_the_ring() -> None:
    ring, kept = torch.zeros(10, 3, 2, dtype=torch.float64), KeptSteps(2)
    filled(29, ring, kept)
    assert kept.window(ring, 0, 29) is None
