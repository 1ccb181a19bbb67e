"""Slice maps: every array against the model itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
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
