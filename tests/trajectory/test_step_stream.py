"""Single steps with the gradient's norms: drain() and on_step, each step once, against the gradients themselves."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import batches, mlp, mse, seeded
from points import gradient_norms
from torch import nn

from lipcore import Monitor, Trajectory, _core

BOTH = ["update_norm", "grad_norm", "clipped_grad_norm"]
(X, Y), *_ = batches(1, 4)


class Blocks:
    """What a callback got."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.arrays: list[Any] = []

    def __call__(self, first_step: int, arrays: Any) -> None:
        self.first.append(first_step)
        self.arrays.append(arrays)

    @property
    def lengths(self) -> list[int]:
        return [len(arrays["update_norm"]) for arrays in self.arrays]

    def column(self, quantity: str, place: str) -> np.ndarray:
        return np.concatenate([arrays[quantity][:, arrays.places.index(place)] for arrays in self.arrays])

    def check(self, first: int = 1) -> None:
        """Each step exactly once, in order."""
        ends = np.cumsum([first, *self.lengths])
        assert self.first == ends[:-1].tolist()


def trained(
    trajectory: Trajectory, steps: int, watch: Callable[[nn.Module], Any] = lambda model: None, **settings: Any
) -> tuple[Monitor, list[dict[str, float]], list[dict[str, float]]]:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, [trajectory], **settings)
    before, used = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model(X), Y).backward()
        before.append(gradient_norms(model))
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        used.append(gradient_norms(model))
        optimizer.step()
        watch(model)
    return monitor, before, used


# ---- drain()


@pytest.mark.parametrize("settings", [{}, {"mode": "sketch"}, {"mode": "updates", "source": "snapshot"}], ids=str)
def test_drain_has_the_gradients_before_and_after_clipping(settings: dict[str, Any]) -> None:
    trajectory = Trajectory(stats=BOTH, **settings)
    _, before, used = trained(trajectory, 9)
    history = trajectory.drain()
    for found, truth in ((history.grad_norm, before), (history.clipped_grad_norm, used)):
        assert found.shape == history.update_norm.shape
        for i, place in enumerate(history.places):
            assert found[:, i].tolist() == pytest.approx([step[place] for step in truth])
    assert ("0.weight" in history.places) == (settings.get("mode") != "sketch")


def test_what_was_not_asked_for_is_nan() -> None:
    trajectory = Trajectory()
    _, before, _ = trained(trajectory, 3)
    history = trajectory.drain()
    assert history.grad_norm[:, -1].tolist() == pytest.approx([step["total"] for step in before])
    assert history.clipped_grad_norm.isnan().all()
    assert trajectory.drain().grad_norm.shape == (0, len(history.places))
    trajectory = Trajectory(stats=["update_norm"])
    trained(trajectory, 3)
    assert trajectory.drain().grad_norm.isnan().all()


@pytest.mark.parametrize("gap", [1, 40, 700])
def test_steps_without_a_backward_pass_are_nan_and_the_rest_stays_in_place(gap: int) -> None:
    """Also where the gap is longer than the ring, and its quantiles hold none of it."""
    model = seeded(lambda: mlp(5, 7, 1))
    trajectory = Trajectory(model, stats=BOTH, ring=512)
    mse(model(X), Y).backward()
    norm = gradient_norms(model)["total"]
    announced = [True] * 600 + [False] * gap + [True] * 5 + [False] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the steps that were missed
        for there in announced:
            if there:
                trajectory.observe_gradients()
            trajectory.update()
        history, result = trajectory.drain(), trajectory.compute()
    expected = torch.tensor([norm if there else torch.nan for there in announced[-512:]], dtype=torch.float64)
    assert torch.allclose(history.grad_norm[:, -1], expected, equal_nan=True)
    assert torch.allclose(history.clipped_grad_norm[:, -1], torch.full((512,), norm, dtype=torch.float64))
    value = result.grad_norm["total"].p50
    assert (value.count, value.value) == (605, pytest.approx(norm, rel=0.01))


@pytest.mark.filterwarnings("ignore:trajectory. grad_norm lacks:UserWarning")
def test_a_state_keeps_the_gaps() -> None:
    def run(trajectory: Trajectory, model: nn.Module, steps: range) -> None:
        for i in steps:
            if i % 3:
                trajectory.observe_gradients()
            trajectory.update()

    model = seeded(lambda: mlp(5, 7, 1))
    mse(model(X), Y).backward()
    whole, first, second = (Trajectory(model) for _ in range(3))
    run(whole, model, range(20))
    run(first, model, range(10))
    second.load_state_dict(first.state_dict())
    run(second, model, range(10, 20))
    next_one = Trajectory(model)
    run(next_one, model, range(10, 20))
    first.merge(next_one)
    expected = whole.drain().grad_norm
    for other in (second, first):
        assert torch.equal(other.drain().grad_norm.isnan(), expected.isnan())
        assert other.compute().grad_norm["total"].mean.count == 13


# ---- on_step


def test_every_step_once_in_blocks() -> None:
    """Over windows that close on the way, the rest with the Monitor's close; the numbers are drain()'s."""
    blocks = Blocks()
    trajectory = Trajectory(stats=BOTH, on_step=blocks)
    monitor, before, used = trained(trajectory, 200, window_steps=30)
    assert blocks.lengths == [64, 64, 64]
    monitor.close()
    assert blocks.lengths == [64, 64, 64, 8]
    blocks.check()
    history = trajectory.drain()
    assert blocks.arrays[0].places == history.places
    for quantity in ("update_norm", "weight_norm", "grad_norm", "clipped_grad_norm"):
        for i, place in enumerate(history.places):
            expected = pytest.approx(getattr(history, quantity)[:, i].tolist(), rel=1e-15)
            assert blocks.column(quantity, place).tolist() == expected
    assert blocks.column("grad_norm", "total") == pytest.approx([step["total"] for step in before])
    assert blocks.column("clipped_grad_norm", "0") == pytest.approx([step["0"] for step in used])
    assert all(a.dtype == np.float64 and a.flags["C_CONTIGUOUS"] for a in blocks.arrays[0].values())


def test_set_later_it_gets_the_steps_from_then_on() -> None:
    blocks, trajectory = Blocks(), Trajectory(stats=["update_norm"])
    model = seeded(lambda: mlp(5, 7, 1))
    trajectory.bind(model)
    for i in range(700):
        if i == 10:
            trajectory.on_step = blocks
        trajectory.update()
    assert (blocks.first[0], sum(blocks.lengths)) == (11, 640)
    trajectory.flush()
    trajectory.flush()
    assert sum(blocks.lengths) == 690
    trajectory.on_step = None
    trajectory.update()
    trajectory.flush()
    blocks.check(first=11)
    assert trajectory.on_step is None
    assert np.isnan(blocks.column("grad_norm", "total")).all()


def test_numbers_go_on_over_rebind_reset_and_state() -> None:
    blocks = Blocks()
    model = seeded(lambda: mlp(5, 7, 1))
    trajectory = Trajectory(model, on_step=blocks)
    for i in range(300):
        trajectory.update()
        if i == 99:
            trajectory.rebind()
        if i % 70 == 0:
            trajectory.reset()
    state = trajectory.state_dict()  # what it holds has been handed over
    assert sum(blocks.lengths) == 300
    blocks.check()
    other = Blocks()
    again = Trajectory(model, on_step=other)
    again.load_state_dict(state)
    again.update()
    again.close()
    assert other.first == [201]  # the ring's own number
    again.update()
    again.flush()
    assert other.lengths == [1]


def test_an_error_of_the_callback_waits_for_the_next_call() -> None:
    calls = []

    def fails(first_step: int, arrays: Any) -> None:
        calls.append(first_step)
        raise ArithmeticError("as expected")

    trajectory = Trajectory(on_step=fails)
    with pytest.warns(RuntimeWarning, match="on_step raised ArithmeticError: as expected; it is not called any more"):
        monitor, *_ = trained(trajectory, 130, window_steps=50)
    assert calls == [1]
    assert trajectory.on_step is None
    with pytest.raises(ArithmeticError, match="as expected"):
        monitor.compute()
    assert monitor.compute().last_step == 130  # the recording went on
    monitor.close()


def test_alone_the_error_comes_with_the_next_update() -> None:
    def fails(first_step: int, arrays: Any) -> None:
        raise ArithmeticError("as expected")

    trajectory = Trajectory(seeded(lambda: mlp(5, 7, 1)), on_step=fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # even then
        for _ in range(64):
            trajectory.update()
    with pytest.raises(ArithmeticError, match="as expected"):
        trajectory.update()
    trajectory.update()


@pytest.mark.parametrize("wrong", [3, "name", True])
def test_what_cannot_be_called_is_refused(wrong: Any) -> None:
    words = rf"on_step: expected a callable \(first_step, arrays\) or None, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=words):
        Trajectory(on_step=wrong)
    trajectory = Trajectory()
    with pytest.raises(TypeError, match=words):
        trajectory.on_step = wrong


# ---- the compiled parts


def test_blocks_over_the_end_of_the_ring() -> None:
    ring = torch.arange(5 * 4 * 2, dtype=torch.float64).reshape(5, 4, 2)
    first, second = torch.empty(2, 4, 3, dtype=torch.float64)
    _core.step_norms(ring, 3, 7, first, second)
    expected = ring[[3, 4, 0, 1], 1:].sqrt()
    assert torch.allclose(first, expected[..., 0], rtol=1e-15, atol=0)
    assert torch.allclose(second, expected[..., 1], rtol=1e-15, atol=0)
    for begin, end in ((-1, 3), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match=f"recent: expected .* with steps {begin} to {end}"):
            _core.step_norms(ring, begin, end, first, None)
    for out in (first[:3], first.float(), torch.empty(4, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"first, second: expected float64 CPU tensors \[4, at most 4\]"):
            _core.step_norms(ring, 3, 7, out, None)


@pytest.mark.parametrize("there", [(), (0,), (3,), (1, 2), (0, 2, 3), (0, 1, 2, 3)], ids=str)
def test_gradients_where_only_some_parameters_have_one(there: tuple[int, ...]) -> None:
    owner = {str(i): nn.Parameter(torch.full((i + 1,), 2.0)) for i in range(4)}
    for i in there:
        owner[str(i)].grad = torch.full((i + 1,), float(i + 1))
    out = torch.full((4, _core.STEP_COLUMNS), 7.0, dtype=torch.float64)
    gradients = _core.GradientList([(owner, key, None) for key in owner])
    assert gradients.read(out)
    assert out[:, 0].tolist() == [(i + 1) ** 3 if i in there else 0 for i in range(4)]
    assert out[:, 4].tolist() == [0] * 4
    del owner["2"]
    assert not gradients.read(out)
    with pytest.raises(ValueError, match="out: expected a contiguous float64 tensor of shape"):
        gradients.read(out[:3])


def test_a_backward_hook_calls_once_per_pass_and_copies_do_nothing() -> None:
    calls: list[int] = []
    hook = _core.BackwardHook(lambda: calls.append(1))
    model = seeded(lambda: mlp(5, 7, 1))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    for passes in (1, 2):
        mse(model(X), Y).backward()
        assert len(calls) == passes
    for twin in (copy.copy(hook), copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert twin is not hook
        next(model.parameters()).register_post_accumulate_grad_hook(twin)
    mse(model(X), Y).backward()
    assert len(calls) == 3
