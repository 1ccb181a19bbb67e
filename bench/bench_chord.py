"""How much of the path a look at every k-th step sees: the chord against the path length on real small trainings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import threads
from small_transformer import OPTIMIZERS, train

import lipcore

_STEPS = 600
_EVERY = [1, 10, 100]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def bench_chord(benchmark: Any, report: Any, optimizer: str) -> None:
    """No target: the ratio is the training's own, and no factor turns a chord into a path."""

    def run() -> tuple[dict[int, float], list[float]]:
        training = train(optimizer, _STEPS)
        model, _ = next(training)
        trajectories = {k: lipcore.Trajectory(model, every_steps=k) for k in _EVERY}
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
        length, losses = 0.0, []
        for _, loss in training:
            after = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
            length, before = length + float((after - before).norm()), after
            losses.append(loss)
            for trajectory in trajectories.values():
                trajectory.update()
        found = {k: trajectory.compute() for k, trajectory in trajectories.items()}
        chords = {k: (found[k].chord_length if k > 1 else found[k].path_length)["total"].sum.value for k in _EVERY}
        assert chords[1] == pytest.approx(length, rel=1e-9)
        return chords, losses

    with threads(1):
        chords, losses = benchmark.pedantic(run, rounds=1)
    assert losses[-1] < 0.9 * losses[0], "it did not learn"
    for k in _EVERY[1:]:
        title = f"trajectory, small transformer, {optimizer}, every {k} steps: chord over path length"
        details = {"steps": _STEPS, "chord": chords[k], "path": chords[1], "first_loss": losses[0]}
        report.add(title, chords[k] / chords[1], "of the path", **details, last_loss=losses[-1])
