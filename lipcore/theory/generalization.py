"""Theorem 3: how far the error on the training set can be from the expected one, with every factor of the bound."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipcore.metric.results import Value, Window
from lipcore.models.own_pass import own_pass, run
from lipcore.regions.patterns import activation_patterns
from lipcore.theory.arguments import positive, real
from lipcore.theory.assumptions import sigmoid_head
from lipcore.theory.dimension import intrinsic_dimension, log_covering_number
from lipcore.theory.finding import Finding
from lipcore.theory.global_bound import lipschitz_bound
from lipcore.theory.heads import refuse_other_head
from lipcore.theory.windows import select

_BATCH = 1024  # samples per forward pass
_OF_C = ("1 + gamma", "beta", "1 / (mu (1 - mu))", "1 / p_min")  #: the factors of c


@dataclass(frozen=True, repr=False)
class Generalization(Finding):
    """Result of :func:`generalization`: the bound of Theorem 3 and all that goes into it."""

    bound: Value  #: of |er_emp - er_exp|, with probability 1 - delta
    vacuous: bool  #: bound >= 1, or not known to be less
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
    r"""Evaluate Theorem 3 of Loukas et al., for binary classification by a ReLU network with a sigmoid head:

    .. math:: |er_{emp} - er_{exp}| \le \sqrt{\frac{4 \log 2\, N_{cov}(X; r) + 2\log(1/\delta)}{N}},\quad
              r = \frac{\min_i |1 - 2 f(x_i)|}{c \log(\sum_l n_l)\, \varphi},\quad
              c = \frac{(1+\gamma)\beta}{\mu(1-\mu)p_{\min}}

    On real networks it is numerically vacuous (1e4 and more): the factors, and which of them is to blame, are the
    result. The label is heuristic, since gamma, mu, p_min and the dimension are measured at the samples. Where a factor
    is infinite or not known (a sample on the decision boundary, a saturated sigmoid, a run that diverged) the radius is
    0 and the bound infinite, not valid, with the factor named.

    Args:
        history: windows with a Lipschitz metric; steadiness is taken from the first of them on.
        model: maps x to probabilities [N] or [N, 1]; ReLU-family activations; in eval mode where that matters.
        x: training inputs [N, ...].
        gamma: of Assumption 1, from :func:`slack`.
        dimension: intrinsic dimension of the inputs; default :func:`intrinsic_dimension` of x.
        delta: the bound holds with probability 1 - delta.

    Raises:
        ValueError: gamma < 0, delta outside (0, 1), outputs that are not probabilities, x not finite, every unit dead
            or only one there, windows of another output than the model's (a logit), and what :func:`lipschitz_bound`
            and :func:`activation_patterns` refuse.
    """
    slack = real("gamma", gamma)
    if not (slack >= 0 and math.isfinite(slack)):
        raise ValueError(f"gamma: expected a finite number >= 0, got {gamma!r}")
    if not 0 < real("delta", delta) < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta!r}")
    given = None if dimension is None else positive("dimension", dimension)
    if not isinstance(x, Tensor) or not x.dim() or not len(x) or not bool(x.isfinite().all()):
        seen = "values that are not" if isinstance(x, Tensor) and x.numel() else x
        raise ValueError(f"x: expected finite inputs [N, ...] with N >= 1, got {seen}")
    global_bound = lipschitz_bound(history, first_step=first_step, last_step=last_step, place=place)
    patterns = activation_patterns(model, x, batch_size=_BATCH)
    f = _probabilities(model, x)
    head = sigmoid_head(f)
    refuse_other_head(select(history, "lipschitz", first_step, last_step), model, place)
    activity = [share for shares in patterns.activity().values() for share in shares]
    live = [share for share in activity if share > 0]
    if not live:
        raise ValueError("model: no unit is active on any of the samples, so p_min is not defined")
    count, units, mu = len(x), len(activity), head.mu.value
    if units < 2:
        raise ValueError("model: it has one unit, and Theorem 3 divides by log(sum n_l) = 0; expected two or more")
    margin = float((1 - 2 * f.double()).abs().min())
    beta, phi, p_min = global_bound.beta.value, global_bound.phi.value, float(min(live))
    factors = {
        "1 + gamma": 1 + slack,
        "beta": beta,
        "1 / (mu (1 - mu))": 1 / (mu * (1 - mu)) if mu * (1 - mu) > 0 else math.inf,
        "1 / p_min": 1 / p_min,
        "log(sum n_l)": math.log(units),
        "phi": phi,
        "1 / margin": 1 / margin if margin > 0 else math.inf,
    }
    c = math.prod(factors[name] for name in _OF_C)
    steady = phi * c / 4 * factors["log(sum n_l)"]
    radius, killed_by, why = _radius(factors)
    why = why or ("" if global_bound.bound.valid else global_bound.bound.note)
    estimate = intrinsic_dimension(x) if given is None else Value(given, count, "exact", True, "given")
    why = why or ("" if estimate.valid else f"dimension: {estimate.note}")
    log_cover = bound = math.inf
    if radius > 0 and estimate.valid:
        flat = x.detach().double().flatten(1) if x.dim() > 1 else x.detach().double()[:, None]
        extent = float((flat - flat.mean(0)).norm(dim=1).max())
        log_cover = log_covering_number(radius, extent=extent, dimension=estimate.value)
        bound = _bound(log_cover, count, delta)
    elif not estimate.valid:
        killed_by = killed_by if radius == 0 else "dimension"

    def value(number: float, against: str, note: str = "") -> Value:
        return Value(number, count, "heuristic", not against, against or note)

    _, _, of_c = _radius({name: factors[name] for name in _OF_C})
    of_c = of_c or ("" if global_bound.beta.valid else global_bound.beta.note)
    of_steady = of_c or ("" if global_bound.phi.valid else global_bound.phi.note)

    return Generalization(
        bound=value(bound, why, "beyond the largest float" if math.isinf(bound) else ""),
        vacuous=not bound < 1,
        radius=value(radius, why),
        margin=Value(margin, count),
        c=value(c, of_c),
        lambda_steady=value(steady, of_steady),
        beta=global_bound.beta,
        phi=global_bound.phi,
        mu=head.mu,
        p_min=Value(p_min, count),
        dead_units=len(activity) - len(live),
        units=units,
        gamma=slack,
        dimension=estimate,
        log10_covering_number=value(log_cover / math.log(10), why),
        killed_by=killed_by,
        factors=factors,
    )


def _probabilities(model: nn.Module, x: Tensor) -> Tensor:
    found = []
    for part in x.split(_BATCH):
        with own_pass(model), torch.no_grad():
            f = run(model, part.detach().clone())
        if not isinstance(f, Tensor) or f.numel() != len(part):
            shape = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"model: expected one probability per sample, got {shape} for {len(part)} samples")
        found.append(f.reshape(-1))
    return torch.cat(found)


def _radius(factors: dict[str, float]) -> tuple[float, str, str]:
    """Return 1 / product of the factors, the largest of them, and why the radius is not defined. Then it is 0 and
    the bound infinite: a factor that is not finite says nothing about the others, not even where one of them is 0."""
    for name, number in factors.items():
        if math.isnan(number):
            return 0.0, name, f"{name} is not known, so the radius is not defined"
    largest = max(factors, key=factors.__getitem__)
    if math.isinf(factors[largest]):
        return 0.0, largest, f"{largest} is infinite, so the radius is 0"
    product = math.prod(factors.values())
    return (1 / product if product > 0 else math.inf), largest, ""


def _bound(log_cover: float, count: int, delta: float) -> float:
    """Compute the right side of Theorem 3, in logarithms, because covering numbers leave the range of floats."""
    terms = (math.log(4 * math.log(2)) + log_cover, math.log(2 * math.log(1 / delta)))
    log_sum = max(terms) + math.log1p(math.exp(-abs(terms[0] - terms[1])))
    log_bound = 0.5 * (log_sum - math.log(count))
    return math.exp(log_bound) if log_bound < 700 else math.inf
