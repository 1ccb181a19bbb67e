"""Windows of a Trajectory: tumbling, sliding and open since the start, shorter and longer than a block of 512 steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import Graph, seeded
from oracle import DTYPES
from paths import ALL, Path, check, check_elements, mlp, observe, tensors_of, walk
from torch import nn

from lipcore import Metric, Monitor, Trajectory

# Of the variance: the mean is float32, and windows here end ten standard deviations from the reference.
LONG = 5e-6


# ---- since the start


@pytest.mark.parametrize("steps", [511, 512, 513, 1024, 1300])
def test_open_since_the_start(steps: int) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, steps, observe(trajectory, path))
    check(trajectory.compute(), path, tolerance=LONG)
    check(trajectory.compute(), path, tolerance=LONG)  # compute() changes nothing
    walk(tensors, 3, observe(trajectory, path))
    check(trajectory.compute(), path, tolerance=LONG)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_windows_of_every_dtype(dtype: str) -> None:
    tensors = tensors_of(DTYPES[dtype])
    trajectory, path = Trajectory(tensors.items(), stats=[*STATS, "element_variance"]), Path(tensors)
    walk(tensors, 700, observe(trajectory, path))
    check_some(trajectory, path, 1e-11 if dtype == "f64" else LONG)
    check_elements(trajectory, path)


STATS = ("update_norm", "path_length", "variance", "distance")


def check_some(trajectory: Trajectory, path: Path, tolerance: float, start: int = 0, from_start: bool = True) -> None:
    result = trajectory.compute()
    for place, names in {"a": ["a.weight", "a.bias"], "b.weight": ["b.weight"], "total": list(path.tensors)}.items():
        truth = path.expected(names, start, from_start=from_start)
        for quantity in STATS:
            for reducer, value in result[quantity][place].items():
                near = 0.01 if reducer in ("p50", "p99") else tolerance
                assert value.value == pytest.approx(float(truth[quantity][reducer]), rel=near), (quantity, place)


def test_a_drift_without_noise() -> None:
    """The variance of points on a line, n (n + 2) / 12 of a step's square: nothing of it may get lost in the mean."""
    tensor = torch.zeros(100)
    trajectory = Trajectory([("w", tensor)])
    for _ in range(2000):
        tensor.add_(2**-10)
        trajectory.update()
    variance = trajectory.compute().variance["w"].last.value
    assert variance == pytest.approx(100 * 2000 * 2002 / 12 * 2.0**-20, rel=1e-6)


# ---- tumbling


@pytest.mark.parametrize("length", [1, 7, 512, 700, 1300])
def test_tumbling(length: int) -> None:
    """Of a Monitor: each window starts where the one before ended."""
    model = seeded(lambda: nn.Linear(5, 3))
    path = Path(model.named_parameters())
    windows = 3 if length < 1300 else 2
    with Monitor(model, metrics=[Trajectory()], window_steps=length) as monitor:

        def step() -> None:
            monitor.step()
            path.look()
            if len(monitor.history) > len(checked):
                checked.append(monitor.history[-1].last_step)
                start = checked[-1] - length
                check(monitor.history[-1]["trajectory"], path, start=start, tolerance=LONG)

        checked: list[int] = []
        walk(dict(model.named_parameters()), windows * length, step)
    assert checked == [length * i for i in range(1, windows + 1)]
    assert [w.steps for w in monitor.history] == [length] * windows


@pytest.mark.parametrize("lengths", [(700, 700, 40), (40, 700, 520), (1300, 3, 600)])
def test_variance_per_element_starts_anew_with_a_window(lengths: tuple[int, ...]) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), stats=[*STATS, "element_variance"]), Path(tensors)
    for i, length in enumerate(lengths):
        start = len(path.points) - 1
        walk(tensors, length, observe(trajectory, path), seed=i)
        check_some(trajectory, path, LONG, start)
        check_elements(trajectory, path, start)
        trajectory.reset()


def test_variance_per_element_of_an_empty_window() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items(), stats=["element_variance"])
    for _ in range(2):
        assert all(v.isnan().all() for v in trajectory.element_variance().values())
        walk(tensors, 600, trajectory.update)
        assert all((v > 0).all() for v in trajectory.element_variance().values())
        trajectory.reset()
    plain = Trajectory(tensors.items())
    with pytest.raises(RuntimeError, match="element_variance: ask for it with stats="):
        plain.element_variance()


# ---- sliding


@pytest.mark.parametrize(("length", "blocks"), [(6, 3), (4, 4), (1200, 2), (900, 3)])
def test_sliding(length: int, blocks: int) -> None:
    """The last `length` points; before there are as many, all of them and the start."""
    tensors = tensors_of()
    model = Graph(lambda m, x: x)
    for name, tensor in tensors.items():
        module, _, key = name.partition(".")
        if not hasattr(model, module):
            model.add_module(module, nn.Module())
        getattr(model, module).register_parameter(key, nn.Parameter(tensor))
    path, block, checked = Path(model.named_parameters()), length // blocks, []
    metric = Trajectory(stats=[*ALL, "element_variance"])
    with Monitor(model, metrics=[metric], window_steps=length, window_blocks=blocks) as monitor:

        def step() -> None:
            closed = len(monitor.history)
            path.look()
            monitor.step()
            if len(monitor.history) > closed:
                t = len(path.points) - 1
                start = max(0, t - length)
                window = monitor.history[-1]
                assert (window.first_step, window.last_step) == (start + 1, t)
                check(window["trajectory"], path, start=start, from_start=start == 0, tolerance=LONG)
                checked.append(t)

        walk(dict(model.named_parameters()), length + 2 * block + block // 2, step)
    steps = length + 2 * block + block // 2
    assert checked == list(range(block, steps + 1, block))
    start = steps // block * block - (blocks - 1) * block  # blocks - 1 closed ones, and the open one
    check(monitor.compute()["trajectory"], path, start=start, from_start=start == 0, tolerance=LONG)
    check_elements(metric, path, start, from_start=start == 0)


def test_sliding_by_hand() -> None:
    """advance() of a metric that stands alone, after blocks of any length; with one block it is reset()."""
    tensors = tensors_of()
    sliding, tumbling = Trajectory(tensors.items(), window_blocks=3), Trajectory(tensors.items())
    path, ends = Path(tensors), [0]

    def step() -> None:
        sliding.update()
        tumbling.update()
        path.look()

    for i, length in enumerate((600, 3, 530, 1, 40)):
        walk(tensors, length, step, seed=i)
        start = ends[max(0, len(ends) - 3)]
        check(sliding.compute(), path, start=start, from_start=start == 0, tolerance=LONG)
        check(tumbling.compute(), path, start=ends[-1], tolerance=LONG)
        sliding.advance()
        tumbling.advance()
        ends.append(len(path.points) - 1)


def test_blocks_without_a_step() -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), window_blocks=2), Path(tensors)
    trajectory.advance()
    walk(tensors, 4, observe(trajectory, path))
    trajectory.advance()
    check(trajectory.compute(), path, from_start=False, start=0)
    trajectory.advance()
    assert not trajectory.compute().update_norm["total"].last.valid
    assert math.isnan(trajectory.compute().variance["total"].last.value)
    assert trajectory.compute().path_length["total"].cumulative.valid


def test_reset_forgets_the_blocks() -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), window_blocks=3), Path(tensors)
    for seed in range(3):
        walk(tensors, 4, observe(trajectory, path), seed=seed)
        trajectory.advance()
    trajectory.reset()
    walk(tensors, 5, observe(trajectory, path), seed=7)
    check(trajectory.compute(), path, start=12)


# ---- refusals


class Endless(Metric):
    """Has no advance()."""

    name = "endless"

    def bind(self, model: nn.Module) -> None: ...
    def plan(self) -> list[Any]:
        return []

    def finalize(self) -> Any: ...
    def reset(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window_steps": 7, "window_blocks": 2}, "window_blocks: 2 blocks of equal length do not make 7 steps"),
        ({"window_steps": None, "window_blocks": 2}, "window_blocks: 2 blocks of equal length do not make None steps"),
        ({"window_steps": 4, "window_blocks": 0}, "window_blocks: expected an integer >= 1, got 0"),
        ({"window_steps": 4, "window_blocks": 2, "metrics": [Endless()]}, "window_blocks: endless has no sliding"),
        (
            {"window_steps": 4, "window_blocks": 2, "metrics": [Trajectory(window_blocks=4)]},
            "window_blocks: the Monitor slides its windows, with 2 blocks; .* 4 here",
        ),
        (
            {"window_steps": 4, "metrics": [Trajectory(window_blocks=4)]},
            "window_blocks: the Monitor slides its windows, with 1 blocks; .* 4 here",
        ),
    ],
)
def test_windows_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Monitor(mlp(), **settings)


@pytest.mark.parametrize("blocks", [0, -1, 1.5, True, None])
def test_window_blocks_that_are_refused(blocks: Any) -> None:
    with pytest.raises(ValueError, match=r"window_blocks: expected an integer >= 1"):
        Trajectory(mlp(), window_blocks=blocks)
    with pytest.raises(NotImplementedError, match="Endless has no sliding windows"):
        Endless().advance()
