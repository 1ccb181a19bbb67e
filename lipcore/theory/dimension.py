"""Covering numbers, and an estimate of the intrinsic dimension of data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipcore.metric.results import Value
from lipcore.theory.arguments import real

_BLOCK = 1 << 24


def log_covering_number(radius: float, *, extent: float, dimension: float) -> float:
    r"""Compute the natural logarithm of an upper bound of a covering number: how many balls of `radius` cover a ball of
    radius `extent` in `dimension` dimensions, :math:`N \le (1 + 2R/r)^k`, and 1 where r >= R (Vershynin,
    High-Dimensional Probability, Corollary 4.2.13). At radius 0 it is infinite.

    >>> round(log_covering_number(0.5, extent=1.0, dimension=2), 4)
    3.2189
    """
    for name, number in (("radius", radius), ("extent", extent), ("dimension", dimension)):
        if not real(name, number) >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {number!r}")
    if radius >= extent or (not dimension and radius > 0):
        return 0.0  # in no dimensions the ball is a point: 0 times an infinite logarithm would be NaN
    return dimension * math.log1p(2 * extent / radius) if radius > 0 else math.inf


def intrinsic_dimension(x: Tensor, *, neighbors: int = 10) -> Value:
    r"""Estimate by maximum likelihood the dimension of the set that the points x [N, ...] lie on (Levina and Bickel
    2004, averaged as MacKay and Ghahramani 2005 propose): :math:`\hat k^{-1} = \frac{1}{N(m-1)} \sum_i \sum_{j<m} \log
    (T_m(x_i) / T_j(x_i))`, with T_j the distance to the j-th neighbour.

    Heuristic: biased downwards in high dimensions, and distances are Euclidean ones of the raw inputs.

    Raises:
        ValueError: fewer than neighbors + 2 points; neighbors < 2; too many duplicates; points that are not finite.
    """
    if not isinstance(neighbors, int) or neighbors < 2:
        raise ValueError(f"neighbors: expected an integer >= 2, got {neighbors!r}")
    points = torch.as_tensor(x).detach().double()
    if not points.dim() or len(points) < neighbors + 2:
        seen = len(points) if points.dim() else "a single number"
        raise ValueError(f"x: expected at least {neighbors + 2} points for {neighbors} neighbours, got {seen}")
    if not bool(points.isfinite().all()):
        raise ValueError("x: expected finite points, got some that are not; leave them out")
    points = torch.unique(points.flatten(1) if points.dim() > 1 else points[:, None], dim=0)  # duplicates say nothing
    if len(points) < neighbors + 2:
        raise ValueError(f"x: only {len(points)} of its points differ; expected at least {neighbors + 2}")
    points = _scaled(points)
    rows = max(1, _BLOCK // len(points))
    logs = []
    for block in points.split(rows):
        distance = torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.topk(neighbors + 1, largest=False).values[:, 1:]
        logs.append((nearest[:, -1:] / nearest[:, :-1]).log().mean(1))
    inverse = float(torch.cat(logs).mean())
    if not math.isfinite(inverse):
        why = "some points are 1e160 times nearer to each other than to others: beyond the range of floats"
        return Value(math.nan, len(points), "heuristic", False, why)
    if not inverse > 0:
        why = f"all {neighbors} nearest distances are equal (a grid, a simplex?): the estimate needs them to grow"
        return Value(math.inf, len(points), "heuristic", False, why)
    return Value(1 / inverse, len(points), "heuristic", True, "Levina-Bickel")


def _scaled(points: Tensor) -> Tensor:
    """Multiply points by the power of two that brings their spread to 1: squares of distances below 1e-162 would be
    0 and above 1e154 infinite. Exact, and in two steps, since the power itself can be beyond the range of floats."""
    spread = float((points.amax(0) / 2 - points.amin(0) / 2).max())
    exponent = math.frexp(max(spread, math.ulp(0.0)))[1]
    return points * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2)
