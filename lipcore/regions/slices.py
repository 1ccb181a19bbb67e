"""Maps of a model on a two-dimensional slice of its input space: output, regions, local Lipschitz constants,
coverage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcore.lipschitz.pointwise import constants
from lipcore.models.checks import check_batch_size, check_input, check_model
from lipcore.models.names import unwrap
from lipcore.models.outputs import one_per_sample
from lipcore.models.own_pass import own_pass, run
from lipcore.regions.coverage import Coverage
from lipcore.regions.coverage_result import CoverageResult
from lipcore.regions.patterns import activation_patterns
from lipcore.regions.plane import Plane
from lipcore.regions.recording import Output
from lipcore.regions.slice_figure import draw


@dataclass(frozen=True)
class SliceMap:
    """Result of :func:`slice_map`: arrays [R, R], rows by t and columns by s; what was not asked for is None."""

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
        """Draw all panels in one matplotlib figure, save it as a PNG when a path is given, and return it."""
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
    output: Output = None,
    regions: bool = True,
    batch_size: int = 1024,
    progress: bool = False,
) -> SliceMap:
    """Map what a model does on a plane, near the training points and far from them: Figure 6 of Loukas et al. for any
    model.

    Args:
        model: one value per sample; in eval mode where it has BatchNorm or Dropout.
        plane: where to look.
        extent: s from, s to, t from, t to.
        resolution: points along each side.
        target: the true function of inputs [K, ...], [K].
        coverage: of the training inputs and the same model and output; its status and bounds are added (a linear
            programme per new region).
        x: training inputs, to be drawn where they project to.
        output: as in :func:`lipcore.local_lipschitz`.
        regions: False for models without linear pieces.
        batch_size: points per forward pass.
        progress: show a bar while the programmes are solved.

    Raises:
        ValueError: an extent that is empty, a resolution < 2, a target of another length, a coverage of another model,
            and what the parts refuse.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> plane = Plane(torch.zeros(3), torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
    >>> slice_map(model, plane, resolution=20).local_lipschitz.shape
    (20, 20)
    """
    low_s, high_s, low_t, high_t = _checked(extent)
    if not isinstance(resolution, int) or resolution < 2:
        raise ValueError(f"resolution: expected an integer >= 2, got {resolution!r}")
    check_batch_size(batch_size)
    if coverage is not None and (coverage.model is not unwrap(model) or coverage.output != output):
        raise ValueError(
            "coverage: it was built of another model or another output; pass Coverage(model, x, output=output) with "
            "the same ones"
        )
    s, t = np.linspace(low_s, high_s, resolution), np.linspace(low_t, high_t, resolution)
    grid_s, grid_t = (torch.from_numpy(part.ravel()) for part in np.meshgrid(s, t))
    points = _in_dtype_of(model, plane.at(grid_s, grid_t))
    check_input(model, points)
    check_model(model)
    place, distance = (None, None) if x is None else plane.coordinates(x)
    values: list[Tensor] = []
    slopes: list[Tensor] = []
    for part in points.split(batch_size):
        with own_pass(model), torch.no_grad():
            values.append(one_per_sample(run(model, part.clone()), output, len(part)).reshape(-1))
        slopes.append(constants(model, part, output, known_apart=bool(slopes)))
    wanted = None if target is None else _target(target, points)
    square = (resolution, resolution)
    ids = None
    if regions:
        patterns = activation_patterns(model, points, output=output, batch_size=batch_size)
        ids = patterns.region_ids().reshape(square)
    return SliceMap(
        s=s,
        t=t,
        output=torch.cat(values).double().cpu().numpy().reshape(square),
        local_lipschitz=torch.cat(slopes).cpu().numpy().reshape(square),
        regions=ids,
        target=None if wanted is None else wanted.reshape(square),
        coverage=None if coverage is None else coverage.query(points, progress=progress),
        points=place,
        distance=distance,
    )


def _checked(extent: Any) -> tuple[float, float, float, float]:
    sides = tuple(extent) if isinstance(extent, (tuple, list)) else ()
    if len(sides) != 4 or not all(isinstance(side, Real) and math.isfinite(side) for side in sides):
        raise ValueError(f"extent: expected four numbers (s from, s to, t from, t to), got {extent!r}")
    if not (sides[0] < sides[1] and sides[2] < sides[3]):
        raise ValueError(f"extent: expected (s from, s to, t from, t to) with from < to, got {extent}")
    return sides


def _in_dtype_of(model: nn.Module, points: Tensor) -> Tensor:
    """Convert points to the model's dtype. A plane is kept in float32 at least; models in half precision take their
    own dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), points.dtype)
    return points.to(dtype) if dtype in (torch.float16, torch.bfloat16) else points


def _target(target: Callable[[Tensor], Tensor], points: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        found = target(points)
    if not isinstance(found, Tensor) or found.numel() != len(points):
        seen = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"target: expected a tensor of one value for each of the {len(points)} points, got {seen}")
    return found.detach().double().cpu().numpy().reshape(-1)
