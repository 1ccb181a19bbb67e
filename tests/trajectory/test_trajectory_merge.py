"""merge(): intervals of one training run, added up in order, are one window over all of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from few import few
from oracle import DTYPES, assert_same_state
from paths import Path, assert_same_numbers, check, mlp, observe, tensors_of, train, walk
from torch import Tensor

from lipcore import Trajectory

WAYS = ("continued", "anew")
PER_ELEMENT = ("variance", "element_variance", "path_length", "update_norm", "weight_norm")


def next_of(before: Trajectory, tensors: dict[str, Tensor], way: str, **settings: Any) -> Trajectory:
    """A Trajectory of what follows: continued from the state, or started anew where that one is."""
    following = Trajectory(tensors.items(), **settings)
    if way == "continued":
        following.load_state_dict(copy.deepcopy(before.state_dict()))
        following.reset()
    return following


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "lengths", [(5, 4), (1, 1), (7, 1), (1, 7), (520, 3), (3, 520), (512, 512), (5, 0), (4, 0, 3), (0, 6)]
)
def test_intervals_are_one_window(lengths: tuple[int, ...], way: str) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, lengths[0], observe(trajectory, path))
    for i, length in enumerate(lengths[1:]):
        following = next_of(trajectory, tensors, way)
        walk(tensors, length, observe(following, path), seed=10 + i)
        trajectory.merge(following if i % 2 else following.state_dict())
    check(trajectory.compute(), path, tolerance=5e-6)
    drained = trajectory.drain()
    truth = torch.stack([torch.cat(list(p.values())) for p in path.points]).diff(dim=0).norm(dim=1)[-1024:]
    assert drained.steps.tolist() == list(range(sum(lengths) - len(truth) + 1, sum(lengths) + 1))
    assert torch.allclose(drained.update_norm[:, -1], truth, rtol=1e-6)
    walk(tensors, 3, observe(trajectory, path), seed=30)  # and goes on from there
    check(trajectory.compute(), path, tolerance=5e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_dtype(dtype: str, way: str) -> None:
    tensors = tensors_of(DTYPES[dtype])
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, 20, observe(trajectory, path))
    following = next_of(trajectory, tensors, way)
    walk(tensors, 30, observe(following, path), seed=2)
    trajectory.merge(following)
    check(trajectory.compute(), path, tolerance=1e-12 if dtype == "f64" else 1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(5, 4), (7, 1), (520, 40), (40, 520), (0, 5), (5, 0)])
def test_variance_per_element(lengths: tuple[int, int], way: str) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), stats=PER_ELEMENT), Path(tensors)
    walk(tensors, lengths[0], observe(trajectory, path))
    following = next_of(trajectory, tensors, way, stats=PER_ELEMENT)
    walk(tensors, lengths[1], observe(following, path), seed=2)
    trajectory.merge(following)
    for name, found in trajectory.element_variance().items():
        truth = path.element_variance(name)
        assert torch.allclose(found.double(), truth, rtol=2e-4, atol=0), name


@pytest.mark.parametrize("way", WAYS)
def test_intervals_after_a_reset_and_with_steps_left_out(way: str) -> None:
    """Both windows begin in the middle; steps without a tensor are in either, at the seam too."""
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, 6, observe(trajectory, path))
    trajectory.reset()
    walk(tensors, 5, observe(trajectory, path), seed=2, nan_at={1: ("b.weight",)})
    following = next_of(trajectory, tensors, way)
    walk(tensors, 5, observe(following, path), seed=3, nan_at={0: ("a.bias",), 2: ("a.weight", "b.weight")})
    trajectory.merge(following)
    check(trajectory.compute(), path, start=6)


def test_one_that_was_left_out_of_the_whole_first_interval() -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    kept = tensors["a.bias"].clone()
    for _ in range(3):
        tensors["b.weight"].add_(0.1)
        tensors["a.weight"].mul_(1.1)
        tensors["a.bias"].fill_(math.nan)
        observe(trajectory, path)()
    state = copy.deepcopy(trajectory.state_dict())
    tensors["a.bias"].copy_(kept)
    following = Trajectory(tensors.items())
    following.load_state_dict(state)
    following.reset()
    walk(tensors, 4, observe(following, path))
    trajectory.merge(following)
    result, truth = trajectory.compute(), path.expected(["a.bias"])
    assert result.variance["a.bias"].last.value == pytest.approx(float(truth["variance"]["last"]), rel=1e-6)
    assert result.path_length["a.bias"].sum.value == pytest.approx(float(truth["path_length"]["sum"]), rel=1e-6)


@pytest.mark.parametrize("source", few(["snapshot", "optimizer"], 1))
def test_updates_and_gradients(source: str) -> None:
    """Without copies, and norms of gradients: as one that saw everything."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def made() -> Trajectory:
        stats = ("grad_norm", "clipped_grad_norm", "update_norm", "path_length", "max_abs_update")
        if source == "optimizer":
            stats += ("normalized_update_rms", "rms_t", "momentum_norm", "second_moment_norm")
        return Trajectory(model, mode="updates", source=source, optimizer=optimizer, stats=stats)

    whole, first = made(), made()

    def run(steps: int, *trajectories: Trajectory) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            for trajectory in trajectories:
                trajectory.observe_gradients()
                trajectory.before_step()
            optimizer.step()
            for trajectory in trajectories:
                trajectory.observe_step()

    run(520, whole, first)
    second = made()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.reset()
    run(30, whole, second)
    first.merge(second)
    assert_same_numbers(first.compute(), whole.compute(), 1e-12)


def test_every_steps_goes_on_counting() -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), every_steps=3), Path(tensors)
    walk(tensors, 7, observe(trajectory, path))
    following = Trajectory(tensors.items(), every_steps=3)
    following.load_state_dict(copy.deepcopy(trajectory.state_dict()))
    following.reset()
    walk(tensors, 7, observe(following, path), seed=2)
    trajectory.merge(following)
    walk(tensors, 1, observe(trajectory, path), seed=3)
    check(trajectory.compute(), path, every=3)


def test_the_other_one_is_left_alone() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items())
    walk(tensors, 3, trajectory.update)
    following = next_of(trajectory, tensors, "anew")
    walk(tensors, 3, following.update)
    before = copy.deepcopy(following.state_dict())
    trajectory.merge(following)
    assert_same_state(following.state_dict(), before)


# ---- refusals


def test_what_is_not_the_next_interval_is_refused() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items())
    walk(tensors, 3, trajectory.update)
    elsewhere = next_of(trajectory, {n: t + 1 for n, t in tensors.items()}, "anew")
    walk(dict(zip(tensors, (p.tensor for p in elsewhere._watched), strict=True)), 3, elsewhere.update)
    skipped = next_of(trajectory, tensors, "continued")
    walk(tensors, 2, skipped.update)
    skipped.reset()
    walk(tensors, 2, skipped.update)
    moved = next_of(trajectory, tensors, "continued")
    moved.set_reference(tensors_of(seed=8))
    walk(tensors, 2, moved.update)
    before = trajectory.state_dict()
    for other in (elsewhere, skipped, moved, trajectory):
        with pytest.raises(ValueError, match="merge: not the next interval"):
            trajectory.merge(other)
        assert_same_state(trajectory.state_dict(), before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_steps": 2}, "every_steps: the state has 2"),
        ({"groups": lambda name: "all"}, "groups: the state has"),
        ({"mode": "updates", "source": "snapshot"}, "mode: the state has 'updates'"),
        ({"window_blocks": 2}, "window_blocks: the state has 2"),
        ({"ring": 600}, "ring: the state has 600"),
        ({"stats": ["element_variance"]}, "tensors"),
        ({"stats": ["clipped_grad_norm"]}, "gradients"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    model = mlp()
    trajectory = Trajectory(model)
    train(model, 2, trajectory.update)
    before = trajectory.state_dict()
    with pytest.raises(ValueError, match=words):
        trajectory.merge(Trajectory(model, **settings))
    with pytest.raises(ValueError, match="state: expected a dict"):
        trajectory.merge(None)  # type: ignore[arg-type]
    assert_same_state(trajectory.state_dict(), before)


def test_sliding_windows_are_refused() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items(), window_blocks=2)
    walk(tensors, 2, trajectory.update)
    trajectory.advance()
    with pytest.raises(ValueError, match="merge: sliding windows cannot be merged; use window_blocks=1"):
        trajectory.merge(next_of(trajectory, tensors, "continued", window_blocks=2))
