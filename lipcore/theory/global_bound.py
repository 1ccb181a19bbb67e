"""Corollary 1: a bound of the local Lipschitz constants at the data, beside the true maximum and the product of
norms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lipcore.lipschitz.pointwise import local_lipschitz
from lipcore.lipschitz.singular_values import SingularValues
from lipcore.metric.results import Label, Value, Window, weakest
from lipcore.theory.finding import Finding
from lipcore.theory.heads import other_output, place_of
from lipcore.theory.spectral_product import spectral_norm_product
from lipcore.theory.training import joined, steadiness
from lipcore.theory.windows import NEEDS, select, span, with_samples

_NOW = "of the model as it is now; phi is of the weights as they were visited"
_ROUNDING = 1 + 1e-4  # of float32 models, whose r and lambda come from different backward passes

_RANKS = "; where ranks hold parts of the model, pass monitor.global_history"


@dataclass(frozen=True, repr=False)
class GlobalBound(Finding):
    """Result of :func:`lipschitz_bound`: Corollary 1, the maximum of lambda over the data <= beta phi."""

    bound: Value  #: beta phi
    beta: Value  #: largest sigma_1(W_1) over the windows
    phi: Value  #: steadiness from the first of the windows on
    largest: Value  #: true maximum of lambda over the given inputs, of the model as it is now; NaN without them
    spectral_product: Value  #: prod ||W_l||_2 times the activations' constants; not valid where it is not known


def lipschitz_bound(
    history: Iterable[Window],
    model: nn.Module | None = None,
    x: Tensor | None = None,
    *,
    output: int | Callable[[Any], Tensor] | None = None,
    first_step: int | None = None,
    last_step: int | None = None,
    place: str | None = None,
    metric: str = "lipschitz",
) -> GlobalBound:
    r"""Evaluate Corollary 1 of Loukas et al.: :math:`\lambda(R_x) \le \beta\varphi` for every sample visited at t >=
    tau, with :math:`\beta \ge \sigma_1(W_1)` and :math:`\varphi` the steadiness from tau on (Definition 1).

    It is about samples as they were visited from tau on. With `model` and `x` (the training inputs) two numbers stand
    beside it: the true maximum of lambda over x now, and :func:`spectral_norm_product`, which bounds it everywhere. The
    maximum can lie above the bound, at weights or inputs that no recorded sample was at; its note says when it does.
    Where the model's output is seen to be another than that of the windows (a probability and its logit), both are not
    valid.

    Bound and phi are not valid where steps between the windows are missing, nor where a number in them is not finite (a
    run that diverged), nor where more than W_1 stands between the model's input and the rest (something before it, an
    input skip). The bound is heuristic where lambda is (BatchNorm in train mode) and where W_1 moved within a window.
    Windows without a recorded sample are passed over.

    Raises:
        ValueError: no window; no Lipschitz metric; its first layer has no spectral norm (an Embedding); only one of
            model and x was given.
    """
    if (model is None) != (x is None):
        raise ValueError("model, x: expected both or neither")
    windows = select(history, metric, first_step, last_step)
    curve = steadiness(windows, place=place, metric=metric)
    visited = with_samples(windows, metric)
    place = place_of(visited[0], metric, place)
    beta, slopes = _beta(visited, metric), [window[metric]["local_lipschitz"][place]["mean"] for window in visited]
    recorded = math.isfinite(curve.phi[0])
    why = curve.note or ("" if recorded else "no sample was recorded")
    phi = Value(curve.phi[0], len(windows), curve.label, not why, why or _skipped(windows, metric))
    number = beta.value * phi.value
    bound = Value(
        number,
        len(windows),
        weakest([phi.label, beta.label, "one-sided", *(slope.label for slope in slopes)]),
        beta.valid and phi.valid and math.isfinite(number),
        joined([beta.note, "" if phi.valid else phi.note, *(slope.note for slope in slopes if slope.valid)]),
    )
    largest = product = Value(math.nan, 0, "exact", False, "pass model and x")
    if model is not None and x is not None:
        largest = _largest(model, x, output, bound)
        try:
            product = spectral_norm_product(model, x)
        except ValueError as error:
            product = Value(math.nan, 0, "one-sided", False, str(error))
        apart = other_output(place, model)
        if apart:
            product = replace(product, valid=False, note=joined([product.note, apart]))
        if apart and not callable(output):
            largest = replace(largest, valid=False, note=joined([_NOW, apart]))
    return GlobalBound(bound, beta, phi, largest, product)


def _skipped(windows: list[Window], metric: str) -> str:
    """Say how many samples phi leaves out, because they were not recorded."""
    count = sum(row["sum"].value for window in windows for row in window[metric]["skipped"].values())
    return f"{count:.0f} samples skipped, whose loss gradient was 0 or not finite" if count else ""


def _beta(windows: list[Window], metric: str) -> Value:
    """Return the largest of the windows' sigma_1, each an upper bound; NaN where one is NaN, since the result of
    max() would depend on the order."""
    largest, notes, broken = -math.inf, [], []
    label: list[Label] = ["exact"]
    for window in windows:
        details = window[metric].details
        if "sandwich_off" in details:
            broken.append(str(details["sandwich_off"]))
            continue
        if "singular_values" not in details:
            raise ValueError(f"history: {span(window)} has no singular values of the first layer: {NEEDS}{_RANKS}")
        sigma = SingularValues.of_details(details["singular_values"])
        if math.isfinite(sigma.upper):
            largest = max(largest, sigma.upper)
        else:
            broken.append(f"{sigma.rule} at the end of {span(window)}")
        if not sigma.exact:
            label.append("one-sided")
            notes.append(f"sigma_1 from above ({sigma.rule})")
        if "first_weight_not_alone" in details:
            label.append("heuristic")
            notes.append(str(details["first_weight_not_alone"]))
        if details["first_weight_moved"]:
            label.append("heuristic")
            notes.append("W_1 moved within a window; beta is from the windows' ends")
    if broken:
        return Value(math.nan, len(windows), weakest(label), False, joined(broken))
    return Value(largest, len(windows), weakest(label), True, joined(notes))


def _largest(model: nn.Module, x: Tensor, output: int | Callable[[Any], Tensor] | None, bound: Value) -> Value:
    values = local_lipschitz(model, x, output=output)
    if not len(values):
        raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {list(x.shape)}")
    # A ReLU's gradient at NaN is 0: lambda can be finite where neither input nor weights are.
    for name, tensors in (("x", [x]), ("model", itertools.chain(model.parameters(), model.buffers()))):
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            return Value(math.nan, len(values), "exact", False, f"{name} holds values that are not finite")
    if not bool(values.isfinite().all()):
        return Value(math.nan, len(values), "exact", False, "lambda is not finite at some inputs")
    number = float(values.max())
    above = f"above the bound: {_above(bound)}" if number > bound.value * _ROUNDING else ""
    return Value(number, len(values), "exact", True, joined([_NOW, above]))


def _above(bound: Value) -> str:
    """Say why a number can be above the bound."""
    if not bound.valid:
        return "that is not valid"
    if bound.label == "heuristic":
        return "that is heuristic"
    return "no recorded sample was at these weights and inputs"
