"""Slice maps: every array against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Graph
from torch import nn

from lipcore import local_lipschitz
from lipcore.regions import Coverage, Plane, slice_map

MODEL = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))


def test_arrays_are_those_of_the_points(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    plane = Plane.through(x[0], x[1], x[2])
    coverage = Coverage(MODEL, x)
    found = slice_map(
        MODEL, plane, extent=(-1, 2, -1.5, 1.5), resolution=9, target=lambda p: p.sum(1), coverage=coverage, x=x
    )
    for row, column in ((0, 0), (3, 7), (8, 8)):
        point = plane.at(torch.tensor([found.s[column]]), torch.tensor([found.t[row]]))
        assert found.output[row, column] == pytest.approx(float(MODEL(point)), rel=1e-5)
        assert found.local_lipschitz[row, column] == pytest.approx(float(local_lipschitz(MODEL, point)))
        assert found.target is not None
        assert found.target[row, column] == pytest.approx(float(point.sum()), rel=1e-5)
    assert found.points is not None
    assert found.distance is not None
    assert np.allclose(found.points[:2, 0], [0, 1], atol=1e-5)
    assert np.allclose(found.points[:3, 1], [0, 0, 1], atol=1e-5)
    assert np.allclose(found.distance[:3], 0, atol=1e-5)
    assert found.distance[3] > 1e-3
    assert found.coverage is not None
    assert (found.coverage.bound >= found.local_lipschitz.ravel() * (1 - 1e-5)).all()
    assert found.regions is not None
    assert len(np.unique(found.regions)) == found.regions.max() + 1
    pytest.importorskip("matplotlib")
    figure = found.draw(tmp_path / "slice.png", title="a slice")
    panels = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert panels[:4] == ["target", "output", "linear regions", "local Lipschitz constant (exact)"]
    assert (tmp_path / "slice.png").stat().st_size > 5000


def test_a_pixels_centre_is_its_grid_point() -> None:
    pytest.importorskip("matplotlib")
    plane = Plane(torch.zeros(4), torch.eye(4)[0], torch.eye(4)[1])
    found = slice_map(MODEL, plane, extent=(-1, 1, 0, 3), resolution=5)
    axis = found.draw().axes[0]
    left, right, low, high = axis.get_images()[0].get_extent()
    assert np.allclose(left + (right - left) * (np.arange(5) + 0.5) / 5, found.s)
    assert np.allclose(low + (high - low) * (np.arange(5) + 0.5) / 5, found.t)
    assert (axis.get_xlim(), axis.get_ylim()) == ((left, right), (low, high))


def test_a_smooth_model_has_a_map_without_regions() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    plane = Plane(torch.zeros(4), torch.eye(4)[0], torch.eye(4)[1])
    found = slice_map(model, plane, resolution=5, regions=False, output=1)
    assert found.regions is None
    assert found.coverage is None
    assert found.output.shape == (5, 5)


def test_refusals() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="lie on a line"):
        Plane.through(x[0], x[1], 2 * x[1] - x[0])
    with pytest.raises(ValueError, match="not orthogonal"):
        Plane(x[0], torch.ones(4), torch.eye(4)[0])
    with pytest.raises(ValueError, match="shape of one input"):
        Plane(x[0], torch.ones(3), torch.eye(4)[0])
    plane = Plane.through(*x)
    with pytest.raises(ValueError, match="extent"):
        slice_map(MODEL, plane, extent=(1, 0, 0, 1))
    with pytest.raises(ValueError, match="resolution: expected an integer >= 2, got 1"):
        slice_map(MODEL, plane, resolution=1)


def wrong(**settings: Any) -> Callable[[], Any]:
    plane = Plane(torch.zeros(4), torch.eye(4)[0], torch.eye(4)[1])
    return lambda: slice_map(MODEL, plane, **({"resolution": 3} | settings))


def other_coverage(**settings: Any) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2 if settings else 1))
    return wrong(coverage=Coverage(model, torch.randn(9, 4), **settings))


TWO_HEADED = Graph(lambda m, x: {"a": m.a(x).relu()}, a=nn.Linear(4, 1))
A, B, C = torch.eye(4)[:3].clone()
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dict": (
        lambda: slice_map(TWO_HEADED, Plane.through(A, B, C), resolution=3),
        ValueError,
        "output: the model returns a dict; pass output=",
    ),
    "batch size": (wrong(batch_size=0), ValueError, "batch_size: expected an integer >= 1, got 0"),
    "three numbers": (wrong(extent=(0, 1, 2)), ValueError, r"extent: expected four numbers .*, got \(0, 1, 2\)"),
    "infinite extent": (wrong(extent=(0, 1, 0, float("inf"))), ValueError, "extent: expected four numbers"),
    "short target": (
        wrong(target=lambda p: p[:2, 0]),
        ValueError,
        r"target: expected a tensor of one value for each of the 9 points, got shape \[2\]",
    ),
    "numpy target": (wrong(target=lambda p: p.numpy()), ValueError, "target: .* got a ndarray"),
    "numpy x": (wrong(x=np.zeros((3, 4))), TypeError, "x: expected a tensor, got ndarray"),
    "narrow x": (wrong(x=torch.zeros(3, 2)), ValueError, r"x: expected shape \[N, 4\], got \[3, 2\]"),
    "coverage of another model": (other_coverage(), ValueError, "coverage: it was built of another model"),
    "coverage of another output": (other_coverage(output=1), ValueError, "coverage: it was built of another model"),
    "integers": (lambda: Plane.through(A.long(), B, C), TypeError, "a: expected a floating tensor, got torch.int64"),
    "numpy": (lambda: Plane.through(A, B.numpy(), C), TypeError, "b: expected a floating tensor, got ndarray"),
    "nan": (lambda: Plane.through(A, B * float("nan"), C), ValueError, "b: it has NaN or infinity"),
    "nan in u": (lambda: Plane(A, B * float("nan"), C), ValueError, "u: it has NaN or infinity"),
    "broadcast": (lambda: Plane.through(A, B[:1], C), ValueError, r"a, b, c: they need the shape of one input"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_plane_through_inputs_of_any_precision(dtype: torch.dtype) -> None:
    """Orthogonal in float32 at least; a model in half precision gets points of its own dtype."""
    torch.manual_seed(0)
    plane = Plane.through(*torch.randn(3, 4).to(dtype))
    assert plane.u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).to(dtype)
    assert np.isfinite(slice_map(model, plane, resolution=3).local_lipschitz).all()
