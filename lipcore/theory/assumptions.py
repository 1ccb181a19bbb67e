"""The constants that Theorems 2 and 3 assume: gamma and tau of Assumption 1, mu and xi of a sigmoid head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcore.metric.results import Value
from lipcore.theory.finding import Finding
from lipcore.theory.training import joined


@dataclass(frozen=True, repr=False)
class Slack(Finding):
    """Result of :func:`slack`: Assumption 1, measured at some points in some passes."""

    gamma: Value  #: max over points and pairs of passes from tau on of lambda / lambda' - 1
    median: Value  #: over points, of the same
    tau: int  #: step of the pass from which on it was measured
    constant: int  #: points whose lambda was 0 in all of the passes: no ratio


def slack(passes: Iterable[Tensor], steps: Iterable[int] | None = None, *, tau: int | None = None) -> Slack:
    r"""Measure gamma of Assumption 1 of Loukas et al.: after step tau the Lipschitz constant of a region changes by at
    most a factor 1 + gamma. Theorems 2 and 3 need it.

    Measured from two or more passes over the same points, :math:`\lambda_i` of each from
    :func:`lipcore.local_lipschitz` (or a monitor's probe): :math:`1 + \gamma = \max_i \max_t \lambda_i(t) / \min_t
    \lambda_i(t)`. Heuristic: between the passes and off the points it may be larger. Where lambda is 0 in one pass and
    not in another no factor is enough: gamma is infinite and not valid. Points at 0 in all passes are left out.

    Args:
        passes: tensors [N] of local Lipschitz constants.
        steps: when each pass was made, in the same order; default 0, 1, ....
        tau: only passes from this step on; default the first.

    Raises:
        ValueError: fewer than two passes from tau on; different lengths; empty, negative or not finite values.
    """
    if isinstance(passes, str) or not isinstance(passes, Iterable):
        raise ValueError(f"passes: expected tensors [N], one for each pass, got {passes!r}")
    passes = list(passes)
    steps = list(range(len(passes))) if steps is None else list(steps)
    if len(steps) != len(passes):
        raise ValueError(f"steps: expected one for each of {len(passes)} passes, got {len(steps)}")
    chosen = [(s, torch.as_tensor(p).double()) for s, p in zip(steps, passes, strict=True) if tau is None or s >= tau]
    if len(chosen) < 2:
        start = "" if tau is None else f" from step {tau} on"
        raise ValueError(f"passes: expected at least two{start}, got {len(chosen)}")
    shapes = {tuple(p.shape) for _, p in chosen}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
        raise ValueError(f"passes: expected tensors [N] of the same N >= 1, got shapes {sorted(shapes)}")
    values = torch.stack([p for _, p in chosen])
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError("passes: expected finite values >= 0, got others")
    low, high = values.amin(0), values.amax(0)
    usable = high > 0
    ratios = high[usable] / low[usable] - 1
    count = len(ratios)
    flat, risen = int((~usable).sum()), int(ratios.isinf().sum())
    note = joined(
        [
            "at these points and passes only" if count else "lambda is 0 at all points",
            f"{flat} points with lambda = 0 left out" if flat else "",
            f"{risen} points with lambda = 0 in some passes only: no factor bounds their change" if risen else "",
        ]
    )
    numbers = (float(ratios.max()), float(ratios.median())) if count else (math.nan, math.nan)
    gamma, median = (Value(v, count, "heuristic", math.isfinite(v), note) for v in numbers)
    return Slack(gamma, median, min(step for step, _ in chosen), flat)


@dataclass(frozen=True, repr=False)
class SigmoidHead(Finding):
    """Result of :func:`sigmoid_head`: how far a probability stays from 0 and 1."""

    mu: Value  #: min over samples of min(f, 1 - f)
    xi: Value  #: 0.25 / (mu (1 - mu)); 1 for a linear head


def sigmoid_head(probabilities: Tensor) -> SigmoidHead:
    r"""Measure mu and xi of Theorems 2 and 3 of Loukas et al. for a network that ends in a sigmoid: :math:`f(x) \in
    [\mu, 1-\mu]`, and :math:`\xi = 0.25 / (\mu(1-\mu))`, the ratio of the sigmoid's largest slope to its smallest.

    Exact for the given samples; heuristic for the whole input space, which the theorems speak of.

    Raises:
        ValueError: empty; values outside [0, 1]. At mu = 0 (a saturated sigmoid), or so near to it that 1/mu is beyond
            the range of floats, xi is infinite and not valid.
    """
    f = torch.as_tensor(probabilities).double().flatten()
    if not len(f):
        raise ValueError("probabilities: expected at least one value, got none")
    if not bool(((f >= 0) & (f <= 1)).all()):
        if not bool(f.isfinite().all()):
            raise ValueError("probabilities: expected values in [0, 1], got some that are not finite")
        raise ValueError(
            f"probabilities: expected values in [0, 1], got {float(f.min()):.6g} to {float(f.max()):.6g}; was this the "
            "logit?"
        )
    mu = float(torch.minimum(f, 1 - f).min())
    xi = 0.25 / (mu * (1 - mu)) if mu > 0 else math.inf
    of_mu = of_xi = "over the given samples"
    if not mu:
        of_mu = of_xi = "a probability is 0 or 1 exactly: no slope is left there"
    elif math.isinf(xi):
        of_xi = "beyond the largest float"
    return SigmoidHead(
        Value(mu, len(f), "heuristic", True, of_mu), Value(xi, len(f), "heuristic", math.isfinite(xi), of_xi)
    )
