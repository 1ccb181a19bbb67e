"""Theorem 2: which inputs the regions of the training points speak for, and what they say of the Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcore.chain import modules_in_order
from lipcore.pointwise import local_lipschitz
from lipcore.regions.kernel import log_kernel, log_norms
from lipcore.regions.least_cost import LeastCost
from lipcore.regions.patterns import Patterns, activation_patterns
from lipcore.results import json_ready

_RANK = 1e-11  # eigenvalues of the normalised Gram matrix under this share of the largest are rounding
_SPAN = 1e-8  # squared sine of the angle to the span under which a pattern lies in it
_BLOCK = 1024


@dataclass(frozen=True)
class CoverageResult:
    """One entry per queried input; all bounds are of the model's local Lipschitz constant at that input."""

    status: NDArray[np.str_]  #: "train", "combination" or "uncovered"
    k: NDArray[np.int64]  #: training regions combined: 1 for "train", 0 for "uncovered"
    #: exact for "train"; one-sided for "combination" (Theorem 2 with the constants of this moment: gamma = 0); inf for
    #: "uncovered"
    bound: NDArray[np.float64]
    #: one-sided, the best of the relaxation's candidates (see :class:`Coverage`); NaN where ||M|| is not known
    relaxed: NDArray[np.float64]
    nearest: NDArray[np.float64]  #: one-sided, from the one training region that gives the least; NaN as above

    def __repr__(self) -> str:
        shares = ", ".join(f"{np.mean(self.status == s):.1%} {s}" for s in ("train", "combination", "uncovered"))
        return f"CoverageResult({len(self.status)} inputs: {shares})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready lists; what is not finite becomes None."""
        found: dict[str, Any] = json_ready({field.name: getattr(self, field.name) for field in fields(self)})
        return found


class Coverage:
    r"""Is an input explained by the regions of the training points? Theorem 2 of Loukas, Poiitis and Jegelka
    (NeurIPS 2021), in kernel form.

    The gradient of a scalar ReLU network is linear in the Kronecker product s(x) of its layers' activation patterns.
    Hence, where :math:`s(x) = \sum_i k_i s(x_i)` over training points,

    .. math:: \lambda(x) \le \min_k \sum_i |k_i| \lambda_i \quad\text{subject to}\quad s(x) = \sum_i k_i s(x_i)

    with the training points' own constants :math:`\lambda_i` of this moment (so the theorem's gamma is 0 and its
    beta phi xi is replaced by what it bounds). Neither s(x) nor the programme with prod(n_l) rows is formed: the Gram
    matrix :math:`\prod_l \langle s_l(x_i), s_l(x_j)\rangle` leaves rank(K) rows. Solutions are certified by their dual.

    Beside it a relaxation that is always finite, for chains of Linear and ReLU: for any k,
    :math:`\lambda(x) \le \sum_i |k_i|\lambda_i + \|M\|\,\|s(x) - Sk\|`, M the map from patterns to gradients. Its
    candidates are the programme's k, the least-squares k, the nearest region and k = 0; each is a bound.

    Args:
        model: scalar output, ReLU-family activations; in eval mode where it has BatchNorm or Dropout. A sigmoid head is
            refused (its gradient is not constant in a region): pass the part before it.
        x: training inputs [N, ...].
        output: as in :func:`lipcore.local_lipschitz`, for outputs with several values.
        batch_size: inputs per forward pass.

    Raises:
        ValueError: what :func:`activation_patterns` refuses; several output values; a head without linear pieces.

    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> x = torch.randn(50, 2)
    >>> Coverage(model, x).query(x[:3], solve=False).status.tolist()
    ['train', 'train', 'train']
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        output: int | Callable[[Any], Tensor] | None = None,
        batch_size: int = 1024,
    ) -> None:
        self._model, self._batch_size = model, batch_size
        patterns = activation_patterns(model, x, batch_size=batch_size)
        if patterns.head:
            raise ValueError(
                f"model: its head ({patterns.head}) is not piecewise linear, so the gradient is not constant in a "
                "region; pass the part before it (model[:-1])"
            )
        codes, first = np.unique(patterns.codes, return_index=True)
        self.regions = len(codes)  #: distinct regions among the training inputs
        self.samples = first  #: for each region the first training input in it
        self._ids = {code.tobytes(): i for i, code in enumerate(codes)}
        self._patterns = patterns.take(first)
        values = [local_lipschitz(model, part, output=output) for part in x[torch.from_numpy(first)].split(batch_size)]
        self.local_lipschitz = torch.cat(values).cpu().numpy()  #: exact, of each region
        plain = modules_in_order(model) is not None and all(gate.kind != "leaky" for gate in patterns.layers)
        self._affine = not plain
        self._gradient_map = _gradient_map_norm(model) if plain and output is None else math.nan
        log_norm = log_norms(self._patterns, affine=self._affine)
        # Where all units of a layer are off the pattern is zero, and so is the gradient: no help for other inputs.
        used = np.flatnonzero(np.isfinite(log_norm))
        self._used, self._log_norm = self._patterns.take(used), log_norm[used]
        self._slopes = self.local_lipschitz[used]
        self._costs = self._slopes * np.exp(-self._log_norm)
        gram = np.exp(
            log_kernel(self._used, self._used, affine=self._affine) - self._log_norm[:, None] - self._log_norm
        )
        eigenvalues, vectors = np.linalg.eigh(gram) if len(gram) else (np.zeros(0), np.zeros((0, 0)))
        kept = eigenvalues > _RANK * (eigenvalues[-1] if len(eigenvalues) else 0.0)
        #: rows of the linear programme: the patterns' own coordinates in their span
        self.rank = int(kept.sum())
        roots = np.sqrt(eigenvalues[kept])
        self._whiten = vectors[:, kept] / roots
        self._programme = LeastCost((vectors[:, kept] * roots).T, self._costs)

    def __repr__(self) -> str:
        kind = "multi-affine" if self._affine else "chain"
        return f"Coverage({self.regions} training regions of rank {self.rank}; {kind})"

    def query(self, x: Tensor, *, solve: bool = True, progress: bool = False) -> CoverageResult:
        """Status and bounds of inputs x [Q, ...].

        Args:
            solve: False leaves the linear programmes out: the status stays exact, `bound` of "combination" is then NaN
                and its k 0.
            progress: show a progress bar (rich).

        Raises:
            ModuleNotFoundError: scipy is not installed and a programme has to be solved.
            RuntimeError: the solver gave up on a programme that has a solution.
        """
        patterns = activation_patterns(self._model, x, batch_size=self._batch_size)
        if [gate.width for gate in patterns.layers] != [gate.width for gate in self._patterns.layers]:
            raise ValueError("x: its activations have other sizes than those of the training inputs")
        codes, first, inverse = np.unique(patterns.codes, return_index=True, return_inverse=True)
        unique = patterns.take(first)
        count = len(codes)
        status = np.full(count, "uncovered", dtype="<U11")
        k = np.zeros(count, dtype=np.int64)
        bound, relaxed = np.full(count, np.inf), np.full(count, np.nan)
        nearest = np.full(count, np.nan)
        known = np.array([self._ids.get(code.tobytes(), -1) for code in codes])
        seen = known >= 0
        status[seen], k[seen] = "train", 1
        bound[seen] = relaxed[seen] = nearest[seen] = self.local_lipschitz[known[seen]]
        others = np.flatnonzero(~seen)
        with _bar(progress, len(others)) as advance:
            for start in range(0, len(others), _BLOCK):
                rows = others[start : start + _BLOCK]
                block = self._block(unique.take(rows), solve, advance)
                status[rows], k[rows], bound[rows], relaxed[rows], nearest[rows] = block
        back = inverse.reshape(-1)
        return CoverageResult(status[back], k[back], bound[back], relaxed[back], nearest[back])

    def _block(self, queried: Patterns, solve: bool, advance: Callable[[], None]) -> tuple[NDArray[Any], ...]:
        """status, k, bound, relaxed and nearest of patterns that are not those of a training point."""
        log_norm = log_norms(queried, affine=self._affine)
        zero = ~np.isfinite(log_norm)
        safe = np.where(zero, 0.0, log_norm)
        kappa = np.exp(log_kernel(queried, self._used, affine=self._affine) - safe[:, None] - self._log_norm)
        inside = kappa @ self._whiten  # coordinates in the span, of patterns scaled to length 1
        outside_sq = np.clip(1.0 - np.square(inside).sum(axis=1), 0.0, None)
        spanned = (outside_sq <= _SPAN) & ~zero
        status = np.where(spanned | zero, "combination", "uncovered").astype("<U11")
        k = np.zeros(len(queried), dtype=np.int64)
        bound = np.where(zero, 0.0, np.where(spanned, np.nan, np.inf))
        slack = self._gradient_map * np.exp(safe)  # of k = 0
        near = self._nearest(kappa, safe)
        # Every candidate is a bound: the least one counts. NaN stays where ||M|| is not known.
        squares = np.abs(inside @ self._whiten.T) @ self._costs * np.exp(safe) + slack * np.sqrt(outside_sq)
        relaxed = np.fmin(np.fmin(slack, near), squares)
        relaxed[zero] = near[zero] = 0.0
        for i in range(len(queried)):
            if solve and spanned[i]:
                columns, scaled = self._programme.least(inside[i])
                bound[i] = float(np.abs(scaled) @ self._costs[columns]) * math.exp(safe[i])
                k[i] = int((np.abs(scaled) > 1e-9).sum())
                relaxed[i] = np.fmin(relaxed[i], bound[i])
            advance()
        return status, k, bound, relaxed, near

    def _nearest(self, kappa: NDArray[np.float64], log_norm: NDArray[np.float64]) -> NDArray[np.float64]:
        """min over regions of lambda_j + ||M|| ||s - s_j||."""
        if not len(self._slopes) or math.isnan(self._gradient_map):
            return np.full(len(kappa), np.nan)
        mine, theirs = np.exp(log_norm)[:, None], np.exp(self._log_norm)
        distance = np.sqrt(np.clip(mine**2 + theirs**2 - 2 * kappa * mine * theirs, 0.0, None))
        nearest: NDArray[np.float64] = (self._slopes + self._gradient_map * distance).min(axis=1)
        return nearest


_PASSED_OVER = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _gradient_map_norm(model: nn.Module) -> float:
    r"""||M||_2 of the map from Kronecker patterns to gradients of Linear, ReLU, ..., Linear with one output:
    the root of the largest eigenvalue of W_1^T diag(v) W_1, v = (W_d^2) ... (W_2^2), element-wise squares."""
    chain = [m for m in modules_in_order(model) or [] if not isinstance(m, _PASSED_OVER)]
    linears, between = chain[::2], chain[1::2]
    if not all(isinstance(m, nn.Linear) for m in linears) or not all(isinstance(m, nn.ReLU) for m in between):
        return math.nan
    if len(linears) != len(between) + 1 or linears[-1].out_features != 1:
        return math.nan
    weights = [m.weight.detach().double() for m in linears]  # type: ignore[operator]
    v = torch.ones(1, dtype=torch.float64, device=weights[0].device)
    for weight in reversed(weights[1:]):
        v = v @ weight.square()
    return float(torch.linalg.matrix_norm(v.sqrt()[:, None] * weights[0], ord=2))


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("linear programmes", total=total)
        yield lambda: progress.advance(task)
