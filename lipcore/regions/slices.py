"""A model on a two-dimensional slice of its input space: output, regions, local Lipschitz constants, coverage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcore.pointwise import local_lipschitz
from lipcore.regions.coverage import Coverage
from lipcore.regions.coverage_result import CoverageResult
from lipcore.regions.patterns import activation_patterns


@dataclass(frozen=True)
class Plane:
    """x(s, t) = origin + s u + t v, with u and v orthogonal; their lengths are the units of s and t."""

    origin: Tensor
    u: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(part.shape) for part in (self.origin, self.u, self.v)}
        if len(shapes) != 1:
            raise ValueError(f"plane: origin, u and v need the shape of one input, got {sorted(shapes)}")
        u, v = self.u.double().flatten(), self.v.double().flatten()
        if not float(u.norm()) or not float(v.norm()):
            raise ValueError("plane: u or v is zero")
        if abs(float(u @ v)) > 1e-5 * float(u.norm() * v.norm()):
            raise ValueError("plane: u and v are not orthogonal; use Plane.through() or orthogonalise them")

    @classmethod
    def through(cls, a: Tensor, b: Tensor, c: Tensor) -> Plane:
        """The plane through three inputs: a at (0, 0), b at (1, 0), c at t = 1.

        Raises:
            ValueError: the three lie on a line.
        """
        shape, dtype = a.shape, a.dtype
        origin, to_b, to_c = (part.detach().double().flatten() for part in (a, b - a, c - a))
        length_sq = float(to_b @ to_b)
        v = to_c - to_b * (float(to_c @ to_b) / length_sq) if length_sq else to_c
        if not length_sq or float(v.norm()) <= 1e-6 * float(to_c.norm()):
            raise ValueError("a, b, c: the three inputs lie on a line, so they do not span a plane")
        return cls(*(part.reshape(shape).to(dtype) for part in (origin, to_b, v)))

    def at(self, s: Tensor, t: Tensor) -> Tensor:
        """Inputs [K, ...] for coordinates [K]."""
        shape = (-1, *[1] * self.origin.dim())
        return self.origin + s.to(self.u).reshape(shape) * self.u + t.to(self.v).reshape(shape) * self.v

    def coordinates(self, x: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of inputs [N, ...]: (s, t) [N, 2] of their projection, and their distance from the plane [N]."""
        away = (x - self.origin).detach().double().flatten(1).cpu()
        u, v = (part.detach().double().flatten().cpu() for part in (self.u, self.v))
        s, t = away @ u / (u @ u), away @ v / (v @ v)
        left = away - s[:, None] * u - t[:, None] * v
        return torch.stack([s, t], 1).numpy(), left.norm(dim=1).numpy()


@dataclass(frozen=True)
class SliceMap:
    """Arrays [R, R], rows by t and columns by s; what was not asked for is None."""

    s: NDArray[np.float64]  #: [R]
    t: NDArray[np.float64]  #: [R]
    output: NDArray[np.float64]
    local_lipschitz: NDArray[np.float64]  #: exact, at every grid point
    regions: NDArray[np.int64] | None  #: the same number where the linear region is the same
    target: NDArray[np.float64] | None
    coverage: CoverageResult | None  #: of all R^2 points, row by row
    points: NDArray[np.float64] | None  #: (s, t) of the training inputs' projections
    distance: NDArray[np.float64] | None  #: of the training inputs from the plane

    def draw(self, path: str | Path | None = None, *, title: str = "") -> Any:
        """All panels in one matplotlib figure; saved as a PNG when a path is given, and returned."""
        from lipcore.regions.slice_figure import draw

        return draw(self, path, title)


def slice_map(
    model: nn.Module,
    plane: Plane,
    *,
    extent: tuple[float, float, float, float] = (-1.0, 1.0, -1.0, 1.0),
    resolution: int = 200,
    target: Callable[[Tensor], Tensor] | None = None,
    coverage: Coverage | None = None,
    x: Tensor | None = None,
    output: int | Callable[[Any], Tensor] | None = None,
    regions: bool = True,
    batch_size: int = 1024,
    progress: bool = False,
) -> SliceMap:
    """Figure 6 of Loukas et al. for any model: what it does on a plane, near the training points and far from them.

    Args:
        model: one value per sample; in eval mode where it has BatchNorm or Dropout.
        plane: where to look.
        extent: s from, s to, t from, t to.
        resolution: points along each side.
        target: the true function of inputs [K, ...], [K].
        coverage: of the training inputs; its status and bounds are added (a linear programme per new region).
        x: training inputs, to be drawn where they project to.
        output: as in :func:`lipcore.local_lipschitz`.
        regions: False for models without linear pieces.
        batch_size: points per forward pass.
        progress: show a bar while the programmes are solved.

    Raises:
        ValueError: an extent that is empty, a resolution < 2, and what the parts refuse.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> plane = Plane(torch.zeros(3), torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
    >>> slice_map(model, plane, resolution=20).local_lipschitz.shape
    (20, 20)
    """
    low_s, high_s, low_t, high_t = extent
    if not (low_s < high_s and low_t < high_t):
        raise ValueError(f"extent: expected (s from, s to, t from, t to) with from < to, got {extent}")
    if not isinstance(resolution, int) or resolution < 2:
        raise ValueError(f"resolution: expected an integer >= 2, got {resolution!r}")
    s, t = np.linspace(low_s, high_s, resolution), np.linspace(low_t, high_t, resolution)
    grid_s, grid_t = (torch.from_numpy(part.ravel()) for part in np.meshgrid(s, t))
    points = plane.at(grid_s, grid_t)
    values, constants = [], []
    with torch.no_grad():
        for part in points.split(batch_size):
            found = model(part)
            found = output(found) if callable(output) else found if output is None else found[:, output]
            values.append(found.reshape(-1))
            constants.append(local_lipschitz(model, part, output=output))
        wanted = None if target is None else target(points).reshape(-1)
    square = (resolution, resolution)
    place, distance = (None, None) if x is None else plane.coordinates(x)
    ids = activation_patterns(model, points, batch_size=batch_size).region_ids().reshape(square) if regions else None
    return SliceMap(
        s=s,
        t=t,
        output=torch.cat(values).double().cpu().numpy().reshape(square),
        local_lipschitz=torch.cat(constants).cpu().numpy().reshape(square),
        regions=ids,
        target=None if wanted is None else wanted.detach().double().cpu().numpy().reshape(square),
        coverage=None if coverage is None else coverage.query(points, progress=progress),
        points=place,
        distance=distance,
    )
