"""The specification of a Trajectory: a list of points in float64, and everything by its definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipcore import Trajectory
from lipcore.metric.results import MetricResult
from lipcore.trajectory.groups import by_block

Point = dict[str, Tensor]

#: Every quantity of the default.
ALL = (
    *("update_norm", "update_ratio", "max_abs_update", "path_length", "weight_norm", "unmoved_steps"),
    *("nonfinite_steps", "nonfinite_elements", "distance", "directness", "variance"),
)


class Path:
    """Every parameter's values after every step, in float64. Elements that are not finite stand still, and such a step
    of their tensor is left out of everything but the variance."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.points: list[Point] = []
        self.look()

    def look(self) -> None:
        self.points.append({n: t.detach().double().flatten().clone() for n, t in self.tensors.items()})

    def values_of(self, name: str, points: list[Point]) -> Tensor:
        """A parameter's points as rows; in place of elements that are not finite, what they were before."""
        values = torch.stack([point[name] for point in points])
        steps = torch.arange(len(values))[:, None].expand_as(values)
        return values.gather(0, torch.where(values.isfinite(), steps, 0).cummax(0).values)

    def is_finite(self, name: str, points: list[Point]) -> Tensor:
        return torch.stack([point[name] for point in points]).isfinite().all(dim=1)

    def window_of(self, name: str, points: list[Point], start: int, from_start: bool) -> Tensor:
        """A parameter's points after step `start`, as rows; before them the one that step left, if asked."""
        return self.values_of(name, points)[start if from_start else start + 1 :]

    def element_variance(self, name: str, start: int = 0, from_start: bool = True) -> Tensor:
        window = self.window_of(name, self.points, start, from_start)
        return window.var(dim=0, unbiased=False).reshape(self.tensors[name].shape)

    def expected(
        self,
        names: list[str],
        start: int = 0,
        every: int = 1,
        from_start: bool = True,
        reference: Mapping[str, Tensor] | None = None,
        since: int = 0,
    ) -> dict[str, dict[str, Any]]:
        """What the parameters in `names`, taken together, did since point `start`; `from_start`: that point is one of
        the window's. Distances are from `reference` (default: the first point), the cumulative path from point
        `since`."""
        points, start, since = self.points[::every], start // every, since // every
        reference = points[0] if reference is None else {n: t.detach().double().flatten() for n, t in reference.items()}
        values = {name: self.values_of(name, points) for name in names}
        finite = {name: self.is_finite(name, points)[1:] for name in names}  # else the step is left out
        updates = {name: v[1:] - v[:-1] for name, v in values.items()}
        any_ = torch.stack([*finite.values()]).any(dim=0)
        squares = sum(u.square().sum(1) * finite[name] for name, u in updates.items())
        norms = torch.where(any_, squares.sqrt(), math.nan)  # type: ignore[union-attr]
        weights = sum(v[1:].square().sum(1) * finite[name] for name, v in values.items()).sqrt()  # type: ignore[union-attr]
        largest = torch.stack([u.abs().amax(1) * finite[name] for name, u in updates.items()]).amax(0)
        counted = norms.isfinite()
        in_window = counted & (torch.arange(len(norms)) >= start)
        last = int(counted.nonzero()[-1])
        distance = torch.cat([values[n][-1] - reference[n] for n in names]).norm()
        cumulative = norms[since:][counted[since:]].sum()
        windows = [self.window_of(name, points, start, from_start) for name in names]
        m2 = sum((w - w.mean(dim=0)).square().sum() for w in windows)
        elements = {n: torch.stack([point[n] for point in points[start + 1 :]]) for n in names}
        bad = sum((~e.isfinite()).sum(1) for e in elements.values())
        ratios = torch.where(norms == 0, 0.0, norms / weights)
        return {
            "update_norm": reduced(norms[in_window]),
            "update_ratio": reduced(ratios[in_window]),
            "max_abs_update": {"last": largest[in_window][-1], "max": largest[in_window].max()},
            "path_length" if every == 1 else "chord_length": {"sum": norms[in_window].sum(), "cumulative": cumulative},
            "distance": {"last": distance},
            "directness": {"last": distance / cumulative},
            "variance": {"last": m2 / len(windows[0])},
            "weight_norm": {"last": weights[last]},
            "unmoved_steps": {"sum": (norms[in_window] == 0).sum()},
            "nonfinite_steps": {"sum": (bad > 0).sum()},
            "nonfinite_elements": {"sum": bad.sum()},
        }


def reduced(values: Tensor) -> dict[str, Tensor]:
    in_order = values.sort().values
    quantiles = {f"p{q}": in_order[math.floor(q / 100 * (len(values) - 1) + 0.5)] for q in (50, 99)}
    return {"last": values[-1], "mean": values.mean(), "max": values.max()} | quantiles


def places_of(path: Path, groups: Callable[[str], str] = by_block) -> dict[str, list[str]]:
    """Every place of a result and the parameters it is of."""
    names = list(path.tensors)
    places = {name: [name] for name in names} | {"total": names}
    for name in names:
        places.setdefault(groups(name), []).append(name)
    return places


def check(
    result: MetricResult,
    path: Path,
    groups: Callable[[str], str] = by_block,
    start: int = 0,
    every: int = 1,
    tolerance: float = 1e-6,
    **settings: Any,
) -> None:
    """Every number of a result against its definition."""
    places = places_of(path, groups)
    expected = {place: path.expected(members, start, every, **settings) for place, members in places.items()}
    assert set(result) == set(expected["total"])
    for quantity in result:
        assert set(result[quantity]) == set(places)
        for place, reducers in result[quantity].items():
            assert set(reducers) == set(expected[place][quantity])
            for reducer, value in reducers.items():
                truth = float(expected[place][quantity][reducer])
                near = 0.01 if reducer in ("p50", "p99") else tolerance
                assert value.value == pytest.approx(truth, rel=near), f"{quantity}.{reducer} of {place}"
                assert value.valid
                assert value.label == "exact"


def check_elements(trajectory: Trajectory, path: Path, start: int = 0, from_start: bool = True) -> None:
    found = trajectory.element_variance()
    for name in path.tensors:
        truth = path.element_variance(name, start, from_start)
        assert found[name].shape == truth.shape
        assert torch.allclose(found[name].double(), truth, rtol=2e-4, atol=0), name
        assert float(found[name].double().sum()) == pytest.approx(float(truth.sum()), rel=1e-5), name


def assert_same_numbers(one: MetricResult, other: MetricResult, tolerance: float = 1e-6) -> None:
    """Two results, number by number."""
    mine, theirs = one.flat("tensor"), other.flat("tensor")
    mine, theirs = mine | one.flat("group"), theirs | other.flat("group")
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key] == pytest.approx(value, rel=tolerance, abs=1e-300, nan_ok=True), key


# ---- what moves


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)


def cnn(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 3, groups=1), nn.Flatten(), nn.Linear(12, 1)]
    return nn.Sequential(*layers).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-4),  # float16 rounds 1e-8 to 0
}


def train(
    model: nn.Module,
    steps: int,
    after_step: Callable[[], object],
    optimizer: str = "sgd",
    shape: tuple[int, ...] = (6,),
    seed: int = 1,
) -> None:
    """Regression on noise; after_step() is called after every optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = OPTIMIZERS[optimizer](parameters)
    dtype = parameters[0].dtype
    for _ in range(steps):
        x, y = (torch.randn(s, generator=generator).to(dtype) for s in ((4, *shape), (4, 1)))
        step.zero_grad()
        (model(x) - y).square().mean().backward()
        step.step()
        after_step()


def tensors_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Three tensors in two blocks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 7), "a.bias": (7,), "b.weight": (17,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def walk(
    tensors: Mapping[str, Tensor],
    steps: int,
    after_step: Callable[[], object],
    seed: int = 1,
    nan_at: Mapping[int, tuple[str, ...]] | None = None,
) -> None:
    """A drift and noise of changing size. In the steps `nan_at` (from 0), an element of those tensors is NaN."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        size = 0.01 * (1.5 + math.sin(t / 7))
        for tensor in tensors.values():
            move = torch.randn(tensor.shape, generator=generator) + 0.03
            tensor.data.add_((size * move).to(tensor.dtype))
        broken = {name: tensors[name].detach().clone() for name in (nan_at or {}).get(t, ())}
        for name in broken:
            tensors[name].data.view(-1)[0] = math.nan
        after_step()
        for name, values in broken.items():
            tensors[name].data.copy_(values)


def observe(trajectory: Trajectory, path: Path) -> Callable[[], None]:
    def after_step() -> None:
        trajectory.update()
        path.look()

    return after_step
