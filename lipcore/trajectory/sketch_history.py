"""Kept sketches of a run: distances, angles and principal components between its points."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from lipcore.metric.results import Value


class SketchHistory:
    """Sketches of single steps (of all parameters together): distances and angles between any two of them.

    Every squared distance has a relative standard deviation of sqrt(2 / buckets) at most.
    """

    def __init__(self, buckets: int, limit: int) -> None:
        self.buckets = buckets
        #: Each [buckets], or [kinds, buckets] where ranks hold copies of some parameters and parts of others.
        self._rows: deque[tuple[int, Tensor]] = deque(maxlen=limit)

    def keep(self, step: int, sketch: Tensor) -> None:
        """Add a row."""
        self._rows.append((step, sketch))

    def rows(self) -> list[tuple[int, Tensor]]:
        """Return step and sketch of every kept row, oldest first."""
        return list(self._rows)

    @property
    def by_kind(self) -> Tensor:
        """The sketches by which ranks hold copies of what they are of, float64 [T, kinds, buckets] on the CPU."""
        rows = [sketch.reshape(-1, self.buckets).cpu() for _, sketch in self._rows]
        return torch.stack(rows) if rows else torch.empty(0, 1, self.buckets, dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def steps(self) -> Tensor:
        """Numbers of the kept steps, int64 [T]; 0 is the start."""
        return torch.tensor([step for step, _ in self._rows], dtype=torch.int64, device="cpu")

    @property
    def matrix(self) -> Tensor:
        """The sketches themselves, float64 [T, buckets] on the CPU."""
        return self.by_kind.sum(1)

    def _row(self, step: int) -> Tensor:
        for kept, sketch in self._rows:
            if kept == step:
                return sketch.cpu().reshape(-1, self.buckets).sum(0)
        raise KeyError(f"step {step} was not kept; kept are {self.steps.tolist()[:8]} ...")

    def distance(self, step: int, other_step: int) -> Value:
        """Return ||w_step - w_other|| of two kept steps."""
        number = float((self._row(step) - self._row(other_step)).norm())
        return Value(number, 2, "estimate", error=number / math.sqrt(2 * self.buckets))

    def distance_matrix(self) -> Tensor:
        """Return ||w_s - w_t|| for all kept steps, float64 [T, T]."""
        return torch.cdist(self.matrix, self.matrix, compute_mode="donot_use_mm_for_euclid_dist")

    def cosine(self, first: tuple[int, int], second: tuple[int, int]) -> Value:
        """Return the cosine of the angle between two movements, each from one kept step to another."""
        a, b = (self._row(end) - self._row(start) for start, end in (first, second))
        norms = float(a.norm() * b.norm())
        number = float(a @ b) / norms if norms else math.nan
        return Value(number, 2, "estimate", norms > 0, error=1 / math.sqrt(self.buckets))

    def pca(self, components: int = 2) -> tuple[Tensor, Tensor]:
        """Return the principal components of the trajectory: coordinates of every kept step, float64 [T, components],
        and the share of the variance each component explains, float64 [components]."""
        matrix = self.matrix
        most = min(len(matrix) - 1, self.buckets)
        if not 1 <= components <= most:
            raise ValueError(f"components: expected 1 to {most} for {len(matrix)} kept steps, got {components}")
        u, s, _ = torch.linalg.svd(matrix - matrix.mean(dim=0), full_matrices=False)
        total = s.square().sum()
        shares = s.square() / total if total > 0 else torch.zeros_like(s)
        return (u * s)[:, :components], shares[:components]

    def state_dict(self) -> dict[str, Tensor]:
        """Return steps and sketches."""
        return {"steps": self.steps, "matrix": self.by_kind.squeeze(1)}

    def load(self, steps: Tensor, matrix: Tensor) -> None:
        """Take over a state that was checked."""
        self._rows.clear()
        self._rows.extend(zip(steps.tolist(), matrix.unbind(), strict=True))
