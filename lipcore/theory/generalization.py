"""Theorem 3: how far the error on the training set can be from the expected one. Every factor of it is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipcore.regions.patterns import activation_patterns
from lipcore.results import Value, Window
from lipcore.theory.assumptions import sigmoid_head
from lipcore.theory.dimension import intrinsic_dimension, log_covering_number
from lipcore.theory.finding import Finding
from lipcore.theory.global_bound import lipschitz_bound


@dataclass(frozen=True, repr=False)
class Generalization(Finding):
    """Theorem 3 and all that goes into it."""

    bound: Value  #: of |er_emp - er_exp|, with probability 1 - delta
    vacuous: bool  #: bound >= 1
    radius: Value  #: r(X) = min |1 - 2 f| / (c log(sum n_l) phi)
    margin: Value  #: min over samples of |1 - 2 f|
    c: Value  #: (1 + gamma) beta / (mu (1 - mu) p_min)
    lambda_steady: Value  #: phi c log(sum n_l) / 4
    beta: Value
    phi: Value
    mu: Value
    p_min: Value  #: least share of the samples on which a live unit is active
    dead_units: int  #: never active on the samples; left out of p_min
    units: int  #: sum of n_l
    gamma: float
    dimension: Value
    log10_covering_number: Value
    killed_by: str  #: the largest of the factors that shrink the radius
    factors: dict[str, float]  #: all of them: 1/radius is their product


def generalization(
    history: Iterable[Window],
    model: nn.Module,
    x: Tensor,
    *,
    gamma: float,
    dimension: float | None = None,
    delta: float = 0.05,
    first_step: int | None = None,
    last_step: int | None = None,
    place: str | None = None,
) -> Generalization:
    r"""Theorem 3 of Loukas et al., for binary classification by a ReLU network with a sigmoid head:

    .. math:: |er_{emp} - er_{exp}| \le \sqrt{\frac{4 \log 2\, N_{cov}(X; r) + 2\log(1/\delta)}{N}},\quad
              r = \frac{\min_i |1 - 2 f(x_i)|}{c \log(\sum_l n_l)\, \varphi},\quad
              c = \frac{(1+\gamma)\beta}{\mu(1-\mu)p_{\min}}

    On real networks it is numerically vacuous (1e4 and more): the factors, and which of them is to blame, are the
    result. The label is heuristic, since gamma, mu, p_min and the dimension are measured at the samples.

    Args:
        history: windows with a Lipschitz metric; steadiness is taken from the first of them on.
        model: maps x to probabilities [N] or [N, 1]; ReLU-family activations; in eval mode where that matters.
        x: training inputs [N, ...].
        gamma: of Assumption 1, from :func:`slack`.
        dimension: intrinsic dimension of the inputs; default :func:`intrinsic_dimension` of x.
        delta: the bound holds with probability 1 - delta.

    Raises:
        ValueError: gamma < 0, delta outside (0, 1), outputs that are not probabilities, every unit dead, and what
            :func:`lipschitz_bound` and :func:`activation_patterns` refuse.
    """
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma: expected a number >= 0, got {gamma!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta!r}")
    if dimension is not None and not dimension > 0:
        raise ValueError(f"dimension: expected a number > 0, got {dimension!r}")
    patterns = activation_patterns(model, x)
    with torch.no_grad():
        f = model(x)
    if not isinstance(f, Tensor) or f.numel() != len(x):
        shape = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(f"model: expected one probability per sample, got {shape} for {len(x)} samples")
    head = sigmoid_head(f)
    global_bound = lipschitz_bound(history, first_step=first_step, last_step=last_step, place=place)
    activity = [share for shares in patterns.activity().values() for share in shares]
    live = [share for share in activity if share > 0]
    if not live:
        raise ValueError("model: no unit is active on any of the samples, so p_min is not defined")
    count, units, mu = len(x), len(activity), head.mu.value
    margin = float((1 - 2 * f.double()).abs().min())
    beta, phi, p_min = global_bound.beta.value, global_bound.phi.value, float(min(live))
    inverse = [1 + gamma, beta, math.inf if mu == 0 else 1 / (mu * (1 - mu)), 1 / p_min]
    c = math.prod(inverse)
    names = ("1 + gamma", "beta", "1 / (mu (1 - mu))", "1 / p_min", "log(sum n_l)", "phi", "1 / margin")
    logarithm = math.log(units)
    numbers = [*inverse, logarithm, phi, math.inf if margin == 0 else 1 / margin]
    factors = {name: float(number) for name, number in zip(names, numbers, strict=True)}
    shrinking = math.prod(numbers)
    radius = 1 / shrinking if shrinking > 0 else math.inf
    estimate = intrinsic_dimension(x) if dimension is None else Value(float(dimension), count, "exact", True, "given")
    flat = x.detach().double().flatten(1) if x.dim() > 1 else x.detach().double()[:, None]
    extent = float((flat - flat.mean(0)).norm(dim=1).max())
    log_cover = log_covering_number(radius, extent=extent, dimension=estimate.value)
    log_sum = max(math.log(4 * math.log(2)) + log_cover, math.log(2 * math.log(1 / delta)))
    log_sum += math.log1p(math.exp(-abs(math.log(4 * math.log(2)) + log_cover - math.log(2 * math.log(1 / delta)))))
    log_bound = 0.5 * (log_sum - math.log(count))
    bound = math.exp(log_bound) if log_bound < 700 else math.inf

    def value(number: float, note: str = "", valid: bool = True) -> Value:
        return Value(number, count, "heuristic", valid, note)

    return Generalization(
        bound=value(bound, "beyond the largest float" if math.isinf(bound) else ""),
        vacuous=bound >= 1,
        radius=value(radius),
        margin=Value(margin, count),
        c=value(c),
        lambda_steady=value(phi * c / 4 * logarithm),
        beta=global_bound.beta,
        phi=global_bound.phi,
        mu=head.mu,
        p_min=Value(p_min, count),
        dead_units=len(activity) - len(live),
        units=units,
        gamma=gamma,
        dimension=estimate,
        log10_covering_number=value(log_cover / math.log(10)),
        killed_by=max(factors, key=factors.__getitem__),
        factors=factors,
    )
