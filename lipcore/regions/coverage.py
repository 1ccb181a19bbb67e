"""Theorem 2: for which inputs the training points' regions bound the Lipschitz constant, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcore.lipschitz.pointwise import constants
from lipcore.models.chains import modules_in_order
from lipcore.models.checks import check_rows
from lipcore.models.names import unwrap
from lipcore.regions.bounds import Bounds
from lipcore.regions.coverage_result import CoverageResult
from lipcore.regions.fingerprint import changed, fingerprint
from lipcore.regions.gradient_map import log_gradient_map_norm
from lipcore.regions.patterns import activation_patterns
from lipcore.regions.recording import Output

_BLOCK = 1024


class Coverage:
    r"""Index of the training points' linear regions, which says of any input what those regions imply for its local
    Lipschitz constant: Theorem 2 of Loukas, Poiitis and Jegelka (NeurIPS 2021), in kernel form.

    The gradient of a scalar ReLU network is linear in the Kronecker product s(x) of its layers' activation patterns.
    Hence, where :math:`s(x) = \sum_i k_i s(x_i)` over training points,

    .. math:: \lambda(x) \le \min_k \sum_i |k_i| \lambda_i \quad\text{subject to}\quad s(x) = \sum_i k_i s(x_i)

    with the training points' own constants :math:`\lambda_i` of this moment (so the theorem's gamma is 0 and its
    beta phi xi is replaced by what it bounds). Neither s(x) nor the programme with prod(n_l) rows is formed: the Gram
    matrix :math:`\prod_l \langle s_l(x_i), s_l(x_j)\rangle` leaves rank(K) rows. Solutions are certified by their dual.

    "combination" is a statement about whole numbers: what floating point cannot tell from the span is decided there,
    wrong once in 10^13 cases. Training patterns so close to dependent on others that double precision loses sight of
    the difference take no part in combinations.

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
        ValueError: what :func:`activation_patterns` and :func:`lipcore.local_lipschitz` refuse; a head without linear
            pieces; parameters that are not finite.

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
        output: Output = None,
        batch_size: int = 1024,
    ) -> None:
        self.model, self.output = unwrap(model), output  #: what it is of
        self._batch_size = batch_size
        patterns = activation_patterns(self.model, x, output=output, batch_size=batch_size)
        if patterns.head:
            raise ValueError(
                f"model: its head ({patterns.head}) is not piecewise linear, so the gradient is not constant in a "
                "region; pass the part before it (model[:-1])"
            )
        _check_parameters(self.model)
        self._fingerprint = fingerprint(self.model)
        codes, first = np.unique(patterns.codes, return_index=True)
        self.regions = len(codes)  #: distinct regions among the training inputs
        self.samples = first  #: for each region the first training input in it
        self._ids = {code.tobytes(): i for i, code in enumerate(codes)}
        self._patterns = patterns.take(first)
        slopes = _constants(self.model, x, output, first, batch_size)
        check_rows(torch.isfinite(slopes), "model", "its gradient (of one training input per region)")
        self.local_lipschitz = slopes.numpy()  #: exact, of each region
        multilinear = all(gate.kind not in ("leaky", "fold") for gate in patterns.layers)
        plain = multilinear and modules_in_order(self.model) is not None
        # Activations of a callable output may be passed by, as none in a chain is.
        self._affine = not plain or (callable(output) and not all(gate.in_module for gate in patterns.layers))
        log_map = log_gradient_map_norm(self.model, self._patterns) if plain and output is None else np.nan
        self._bounds = Bounds(self._patterns, self.local_lipschitz, log_map, affine=self._affine)
        self.rank = self._bounds.rank  #: rows of the linear programme: the patterns' own coordinates in their span

    def __repr__(self) -> str:
        kind = "multi-affine" if self._affine else "chain"
        return f"Coverage({self.regions} training regions of rank {self.rank}; {kind})"

    def query(self, x: Tensor, *, solve: bool = True, progress: bool = False) -> CoverageResult:
        """Find status and bounds of inputs x [Q, ...].

        Args:
            solve: False leaves the linear programmes out: the status stays exact, `bound` of "combination" is then NaN
                and its k 0.
            progress: show a progress bar (rich).

        Raises:
            ValueError: the model changed since (parameters, buffers, modules, their settings or hooks); x takes another
                way through it; what :func:`activation_patterns` refuses.
            ModuleNotFoundError: scipy is not installed and a programme has to be solved.
            RuntimeError: the solver gave up on a programme that has a solution.
        """
        if what := changed(self._fingerprint, self.model):
            raise ValueError(
                f"model: it changed since this Coverage was built ({what}), and its numbers are those of then; build "
                "it anew: Coverage(model, x)"
            )
        patterns = activation_patterns(self.model, x, output=self.output, batch_size=self._batch_size)
        if patterns.activations != self._patterns.activations:
            raise ValueError(
                f"x: expected the activations of the training inputs, {self._patterns.activations}, got "
                f"{patterns.activations}; inputs of another size, or another way through the model, are not covered"
            )
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
                block = self._bounds.of(unique.take(rows), solve=solve, advance=advance)
                status[rows], k[rows], bound[rows], relaxed[rows], nearest[rows] = block
        back = inverse.reshape(-1)
        return CoverageResult(status[back], k[back], bound[back], relaxed[back], nearest[back])


def _constants(model: nn.Module, x: Tensor, output: Output, rows: NDArray[np.int64], batch_size: int) -> Tensor:
    """Compute the constants of some rows, in the batches in which the patterns were taken: in other batches rounding
    may put a point that lies on a border into the next region, and the constant would not be that of the pattern."""
    found = torch.empty(len(rows), dtype=torch.float64, device="cpu")
    for start in range(0, len(x), batch_size):
        here = np.flatnonzero((rows >= start) & (rows < start + batch_size))
        if len(here):
            # The patterns have shown that samples do not mix.
            values = constants(model, x[start : start + batch_size], output, known_apart=True)
            found[torch.from_numpy(here)] = values.cpu()[torch.from_numpy(rows[here] - start)]
    return found


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"model: parameter '{name}' has NaN or infinity, and bounds would have them too")


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("linear programmes", total=total)
        yield lambda: progress.advance(task)
