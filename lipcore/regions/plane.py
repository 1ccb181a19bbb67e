"""Plane in input space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore.models.checks import check_rows


@dataclass(frozen=True)
class Plane:
    """Plane of inputs x(s, t) = origin + s u + t v, with u and v orthogonal; their lengths are the units of s and t."""

    origin: Tensor
    u: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        _check_points(origin=self.origin, u=self.u, v=self.v)
        u, v = self.u.double().flatten(), self.v.double().flatten()
        if not float(u.norm()) or not float(v.norm()):
            raise ValueError("plane: u or v is zero")
        if abs(float(u @ v)) > 1e-5 * float(u.norm() * v.norm()):
            raise ValueError("plane: u and v are not orthogonal; use Plane.through() or orthogonalise them")

    @classmethod
    def through(cls, a: Tensor, b: Tensor, c: Tensor) -> Plane:
        """Make the plane through three inputs: a at (0, 0), b at (1, 0), c at t = 1; in float32, or in float64 where
        one of them is.

        Raises:
            TypeError: one of them is not a floating tensor.
            ValueError: the three lie on a line, differ in shape or device, or are not finite.
        """
        _check_points(a=a, b=b, c=c)
        # Half precision would not keep u and v orthogonal.
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype, c.dtype) else torch.float32
        origin, end, other = (part.detach().double().flatten() for part in (a, b, c))
        to_b, to_c = end - origin, other - origin
        length_sq = float(to_b @ to_b)
        v = to_c - to_b * (float(to_c @ to_b) / length_sq) if length_sq else to_c
        if not length_sq or float(v.norm()) <= 1e-6 * float(to_c.norm()):
            raise ValueError("a, b, c: the three inputs lie on a line, so they do not span a plane")
        return cls(*(part.reshape(a.shape).to(dtype) for part in (origin, to_b, v)))

    def at(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the inputs [K, ...] at coordinates s and t, [K] each."""
        shape = (-1, *[1] * self.origin.dim())
        return self.origin + s.to(self.u).reshape(shape) * self.u + t.to(self.v).reshape(shape) * self.v

    def coordinates(self, x: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Project inputs [N, ...] onto the plane: their coordinates (s, t), [N, 2], and their distance from it, [N]."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.shape[1:] != self.origin.shape:
            raise ValueError(f"x: expected shape [N, {_listed(self.origin)}], got {list(x.shape)}")
        away = x.detach().double().flatten(1).cpu() - self.origin.detach().double().flatten().cpu()
        u, v = (part.detach().double().flatten().cpu() for part in (self.u, self.v))
        s, t = away @ u / (u @ u), away @ v / (v @ v)
        left = away - s[:, None] * u - t[:, None] * v
        return torch.stack([s, t], 1).numpy(), left.norm(dim=1).numpy()


def _check_points(**points: Any) -> None:
    first = next(iter(points.values()))
    for name, point in points.items():
        if not isinstance(point, Tensor) or not point.is_floating_point():
            kind = point.dtype if isinstance(point, Tensor) else type(point).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {kind}")
        if point.shape != first.shape:
            names = ", ".join(points)
            raise ValueError(
                f"{names}: they need the shape of one input, got {[list(part.shape) for part in points.values()]}"
            )
        if point.device != first.device:
            raise ValueError(f"{name}: it is on {point.device}, but {next(iter(points))} on {first.device}; move one")
        check_rows(torch.isfinite(point.detach()).reshape(1, -1).all(1), name, "it")


def _listed(point: Tensor) -> str:
    return ", ".join(map(str, point.shape))
