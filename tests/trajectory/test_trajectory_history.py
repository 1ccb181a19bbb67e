"""drain(): single steps; groups=, stats= and the bytes that plan() names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import DTYPES
from paths import Path, check, mlp, observe, tensors_of, train, walk
from torch import Tensor

from lipcore import Trajectory

# ---- drain()


def norms_of(path: Path, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Update and weight norms of these steps (from 1), of tensors, groups and the total."""
    rows = [[name] for name in path.tensors] + [["a.weight", "a.bias"], ["b.weight"], list(path.tensors)]
    points = [torch.stack([torch.cat([p[n] for n in names]) for p in path.points]) for names in rows]
    updates = torch.stack([p.diff(dim=0).norm(dim=1) for p in points], dim=1)
    return updates[first - 1 : last], torch.stack([p[1:].norm(dim=1) for p in points], dim=1)[first - 1 : last]


@pytest.mark.parametrize("ring", [512, 600])
def test_single_steps(ring: int) -> None:
    """Each once, over resets, block boundaries and the ring's end; what was overwritten is counted."""
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), ring=ring), Path(tensors)
    drained = 0
    for i, steps in enumerate((3, 0, 500, 1, 40, ring, ring + 7, 2)):
        walk(tensors, steps, observe(trajectory, path), seed=i)
        if i % 2:
            trajectory.reset()
        history, end = trajectory.drain(), len(path.points) - 1
        assert history.lost == max(0, steps - ring)
        assert history.steps.tolist() == list(range(drained + history.lost + 1, end + 1))
        assert history.places == [*tensors, "a", "b", "total"]
        updates, weights = norms_of(path, drained + history.lost + 1, end)
        assert torch.allclose(history.update_norm, updates, rtol=1e-6, atol=0)
        assert torch.allclose(history.weight_norm, weights, rtol=1e-6, atol=0)
        drained = end
    assert len(trajectory.drain().steps) == 0


def test_steps_that_were_left_out_are_nan() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items())
    walk(tensors, 5, trajectory.update, nan_at={1: ("b.weight",), 3: tuple(tensors)})
    history = trajectory.drain()
    column = {place: i for i, place in enumerate(history.places)}
    missing = history.update_norm.isnan()
    assert missing[:, column["b.weight"]].tolist() == missing[:, column["b"]].tolist() == [0, 1, 0, 1, 0]
    for place in ("a.weight", "a.bias", "a", "total"):
        assert missing[:, column[place]].tolist() == [False, False, False, True, False]


def test_every_steps_numbers_the_observed_steps() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items(), every_steps=3)
    walk(tensors, 10, trajectory.update)
    assert trajectory.drain().steps.tolist() == [1, 2, 3]


def test_of_updates_that_are_given() -> None:
    tensors = {"w": torch.zeros(4)}
    trajectory = Trajectory(tensors.items(), source="explicit")
    for size in (1.0, 2.0):
        tensors["w"].add_(size)
        trajectory.update({"w": torch.full((4,), size)})
    assert trajectory.drain().update_norm[:, 0].tolist() == [2.0, 4.0]


# ---- groups


def test_groups_by_expressions() -> None:
    """The first that is found in the name counts; what matches none is "other"."""
    model = mlp()
    groups = {"biases": r"bias$", "first": r"^0\.", "weights of 2": r"2"}

    def named(name: str) -> str:
        if name.endswith("bias"):
            return "biases"
        return {"0": "first", "2": "weights of 2"}.get(name[0], "other")

    for given in (groups, named):
        trajectory, path = Trajectory(model, groups=given), Path(model.named_parameters())  # type: ignore[arg-type]
        train(model, 4, observe(trajectory, path))
        check(trajectory.compute(), path, named)
    plan = {line.what: line.rule for line in trajectory.plan()}
    assert plan["biases"] == "3 parameters, 17 elements"


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ({"heads": "head"}, ValueError, "groups: the expression of 'heads' matches no trainable parameter"),
        (
            {"all": ".", "biases": "bias"},
            ValueError,
            "groups: the expression of 'biases' matches no .*the first",
        ),
        ({"bad": "("}, ValueError, r"groups: the expression of 'bad', '\(', cannot be read"),
        ({"bad": 3}, ValueError, "groups: the expression of 'bad', 3, cannot be read"),
        ({}, TypeError, "groups: expected a callable"),
        (["a"], TypeError, "groups: expected a callable or a dict of expressions, got list"),
        (lambda name: "", ValueError, "groups: expected a non-empty group name for '0.weight', got ''"),
        (lambda name: 3, ValueError, "groups: expected a non-empty group name for '0.weight', got 3"),
    ],
)
def test_groups_that_are_refused(groups: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Trajectory(mlp(), groups=groups)


# ---- stats


@pytest.mark.parametrize(
    "stats", [["path_length"], "variance", ("directness", "update_ratio"), ["grad_norm", "distance"]]
)
def test_only_what_was_asked_for(stats: Any) -> None:
    model = mlp()
    trajectory, everything = Trajectory(model, stats=stats), Trajectory(model)

    def step() -> None:
        trajectory.observe_gradients()
        trajectory.update()
        everything.update()

    train(model, 5, step)
    result, whole = trajectory.compute(), everything.compute()
    asked = {stats} if isinstance(stats, str) else set(stats)
    assert set(result) == asked
    for quantity in asked & set(whole):
        for place, reducers in whole[quantity].items():
            assert result[quantity][place].items() == reducers.items()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stats": ["speed"]}, "stats: 'speed' is not a quantity of Trajectory; it has update_norm, "),
        ({"stats": []}, "stats: expected at least one of update_norm, "),
        ({"stats": ["update_cosine"]}, "stats: 'update_cosine' is not known in mode 'exact'"),
        ({"stats": ["variance"], "mode": "updates"}, "stats: 'variance' is not known in mode 'updates'"),
        ({"stats": ["element_variance"], "source": "snapshot"}, "stats: 'element_variance' is not known in mode"),
        ({"stats": ["normalized_update_rms"]}, "stats: 'normalized_update_rms' is not known in mode 'exact'"),
    ],
)
def test_stats_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Trajectory(mlp(), **settings)


# ---- bytes


def allocated(trajectory: Trajectory) -> int:
    """Of every tensor that a Trajectory holds, by its number of elements."""
    total = 0
    for tracker in trajectory._built.all_trackers:
        total += tracker.table.rows.nbytes + tracker.table.recent.nbytes
        copies = tracker.copies
        kinds = [copies.prev, copies.ref, copies.deviation, copies.m2] if copies else []
        kinds += [copies.earlier, copies.earlier_m2] if copies else []
        held = [*kinds, *(kind for block in tracker.closed for kind in (block.means, block.m2))]
        total += sum(tensor.nbytes for kind in held for tensor in kind)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stats": ["element_variance"]},
        {"window_blocks": 3},
        {"window_blocks": 3, "stats": ["element_variance"]},
        {"ring": 2000},
        {"stats": ["grad_norm", "variance"]},
        {"source": "explicit"},
    ],
    ids=str,
)
def test_plan_names_the_bytes_that_are_held(settings: dict[str, Any], dtype: str) -> None:
    """Once a window is longer than 512 steps and a sliding one has all its blocks."""
    tensors = tensors_of(DTYPES[dtype])
    trajectory = Trajectory(tensors.items(), **settings)
    planned = sum(line.bytes for line in trajectory.plan())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for block in range(settings.get("window_blocks", 1)):
        if block:
            trajectory.advance()
        for _ in range(513):
            trajectory.update(zeros if "source" in settings else None)
    assert allocated(trajectory) == planned
    assert sum(line.bytes for line in trajectory.plan()) == planned
