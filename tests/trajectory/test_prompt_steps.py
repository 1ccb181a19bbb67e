"""Single steps for listeners that want them soon: each once, in order, the same numbers as in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lipcore import Trajectory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Heard:
    """Steps and norms in the order in which they came, and after which step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.norms: list[float] = []
        self.after: list[int] = []
        self.now = 0

    def __call__(self, first: int, arrays: Any) -> None:
        norms = arrays["update_norm"][:, arrays.places.index("w")].tolist()
        self.steps += range(first, first + len(norms))
        self.norms += norms
        self.after += [self.now] * len(norms)


def made(device: str, **settings: Any) -> tuple[torch.Tensor, Trajectory, Heard, Heard]:
    w = torch.zeros(5, device=device)
    trajectory, prompt, blocks = Trajectory([("w", w)], **settings), Heard(), Heard()
    trajectory.listen(blocks)
    trajectory.listen(prompt, prompt=True)
    return w, trajectory, prompt, blocks


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipcore.trajectory.single_steps.PROMPT", 0.0)


def move(w: torch.Tensor, step: int) -> None:
    w.add_(0.01 * step)


@pytest.mark.parametrize("device", DEVICES)
def test_at_once_and_the_same_as_in_blocks(device: str) -> None:
    w, trajectory, prompt, blocks = made(device)
    for step in range(1, 140):
        prompt.now = step
        move(w, step)
        trajectory.update()
    late = np.array(prompt.after) - np.array(prompt.steps)
    assert late.max() == (0 if device == "cpu" else 1)
    trajectory.flush()
    assert prompt.steps == blocks.steps == list(range(1, 140))
    assert prompt.norms == blocks.norms


@pytest.mark.gpu
def test_no_step_waits() -> None:
    w, trajectory, prompt, _ = made("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 8):
            move(w, step)
            trajectory.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trajectory.flush()
    assert prompt.steps == [*range(1, 8)]


@pytest.mark.gpu
def test_steps_of_which_nobody_tells() -> None:
    """Those of replayed graphs: they come with the next ones."""
    w, trajectory, prompt, _ = made("cuda")
    moves = iter(range(1, 100))
    for silent in (0, 0, 3, 0, 0, 2, 1, 0, 0):
        for _ in range(silent):
            move(w, next(moves))
            trajectory._tracker.step()
        move(w, next(moves))
        trajectory.update()
    trajectory.flush()
    last = prompt.steps[-1]
    assert prompt.steps == list(range(1, last + 1))
    assert prompt.norms == pytest.approx([0.01 * k * 5**0.5 for k in range(1, last + 1)], rel=1e-5)
    assert last == 9 + 6


def test_more_at_once_than_the_ring_holds() -> None:
    w, trajectory, prompt, _ = made("cpu", ring=512)
    for step in range(1, 600):
        move(w, step)
        trajectory._tracker.step()
    move(w, 600)
    trajectory.update()
    assert prompt.steps == [*range(89, 601)]


def test_one_that_raises_is_called_no_more_and_the_others_go_on() -> None:
    w, trajectory, prompt, _ = made("cpu")

    def fails(first: int, arrays: Any) -> None:
        raise OSError("full")

    trajectory.listen(fails, prompt=True)
    with pytest.warns(RuntimeWarning, match="OSError: full"):
        for step in range(1, 4):
            move(w, step)
            trajectory.update()
    assert prompt.steps == [1, 2, 3]
