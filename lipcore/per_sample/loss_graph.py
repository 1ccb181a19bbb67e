"""What a loss was divided by, read from its own graph before the backward pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from lipcore.models.torch_internals import saved
from lipcore.per_sample.loss_batch import check_terms, over_batch
from lipcore.per_sample.loss_factor import LossFactor, agreed, product
from lipcore.per_sample.loss_nodes import (
    ADDED,
    OVER_ELEMENTS,
    OVER_SAMPLES,
    OVER_WEIGHTS,
    SAME_VALUE,
    Made,
    Summed,
    alpha,
    number,
    scaled,
    signed,
    unknown,
)

_REDUCTIONS = ("none", "mean", "sum")  # by torch's numbers
_SUMS = ("Sum", "Nansum", "Dot")
_LISTS = ("Stack", "Cat")
#: What may stand between a log-softmax and the sum of its rows' terms.
_PER_ELEMENT = (*SAME_VALUE, "MaskedFill", "Mul", "Div")


def read_factor(loss: Tensor, batch_dim: int = 0) -> LossFactor:
    r"""Return f with :math:`\nabla l_i = f \cdot` (what the backward pass of this loss brings of sample i), l_i being
    the sum of sample i's loss terms before the reduction to one number.

    The graph is followed from the loss back to that reduction: constants that it was multiplied with or divided by on
    the way are undone, and so is a mean, by the number (or the weight) of its terms. Where the batch was summed up or
    averaged before, as in ``x.mean(0).sum()``, that is the reduction. Of a sum of losses

    .. math:: c_1 \sum_i a_i / N_1 + c_2 \sum_i b_i / N_2

    that are divided by the same :math:`N_1 = N_2 = N`, f is N, so that :math:`l_i = c_1 a_i + c_2 b_i`. In
    cross-entropy with smoothed labels, N is what the part at the targets is divided by.

    Raises:
        TypeError: no tensor.
        ValueError: not one number, no graph, a graph that was freed, or an operation in it whose factor is not known;
            the message names it.
    """
    return read_loss(loss, batch_dim).factor


class Loss(NamedTuple):
    """The findings of read_loss() in the graph of a loss.

    Attributes:
        factor: f, as read_factor() returns it.
        reduction: what the graph was followed to: the reduction, or a sum of losses.
        summed: the tensors whose elements are summed up there.
    """

    factor: LossFactor
    reduction: Made
    summed: list[Summed]


def read_loss(loss: Tensor, batch_dim: int = 0) -> Loss:
    """Return what read_factor() does, and where in the graph it was found."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected the loss, a tensor with a graph, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.grad_fn is None:
        what = "has no graph" if loss.grad_fn is None else f"has shape {list(loss.shape)}"
        raise ValueError(
            f"loss: expected the one number that backward() is called on, before it is; this tensor {what}"
        )
    summed: list[Summed] = []
    try:
        return Loss(*_factor(Made(loss.grad_fn, loss.output_nr), batch_dim, summed), summed)
    except RuntimeError as error:
        raise ValueError(
            f"loss: expected the loss before its backward pass, which frees the graph that is read ({error})"
        ) from error


def _factor(made: Made, batch_dim: int, summed: list[Summed]) -> tuple[LossFactor, Made]:
    parts: list[float | Tensor] = []
    following: Made | None = made
    while following is not None and following.is_one_number:
        made = following
        if made.kind in ("Add", "Sub") and None not in made.origins:
            joined = _joined(made, batch_dim, summed)
            return product(joined.number, *joined.tensors, *parts, doubt=joined.doubt), made
        following = _step(made, batch_dim, parts, summed)
    return product(1.0, *parts), made


def _step(made: Made, batch_dim: int, parts: list[float | Tensor], summed: list[Summed]) -> Made | None:
    """Add what this operation has done to the factor, and return what it was done to; None after the reduction, whose
    operands are added to `summed`."""
    kind, node = made.kind, made.node
    if kind in (*SAME_VALUE, "Add", "Sub"):  # added: a constant
        if kind in ADDED:
            parts.append(1 / alpha(made))
        return made.origin
    if kind in ("Mul", "Div"):
        inner, constant = scaled(made)
        factor = number(node, constant)
        parts.append(factor if kind == "Div" else factor.reciprocal() if isinstance(factor, Tensor) else 1 / factor)
        return inner
    if kind == "Mean" or kind in _SUMS:
        inner = next(origin for origin in made.origins if origin is not None)
        if _is_list_of_losses(inner):
            raise unknown(inner.node, "it joins losses that were reduced before")
        if kind == "Mean":
            parts.append(float(math.prod(inner.shape)))
        if inner.shape == ():  # of one number it was no reduction
            return inner
        check_terms(inner, batch_dim)
        before = over_batch(inner, batch_dim, summed)
        if before is not None:
            parts += [before.number, *before.tensors]
        else:
            summed += [Summed(origin) for origin in made.origins if origin is not None]
        return None
    if kind in (*OVER_ELEMENTS, *OVER_SAMPLES, *OVER_WEIGHTS):
        parts.append(_terms(made))
        summed += [Summed(origin) for origin in made.origins if origin is not None]
        return None
    raise unknown(node, "what it does to the factor is not known")


def _terms(made: Made) -> float | Tensor:
    """Return how many terms a loss function has averaged, or their weight."""
    if _REDUCTIONS[saved(made.node, "reduction")] != "mean":
        return 1.0
    if made.kind in OVER_WEIGHTS:
        return number(made.node, "total_weight")
    shape = next(origin for origin in made.origins if origin is not None).shape
    return float(math.prod(shape) if made.kind in OVER_ELEMENTS else (shape[0] if len(shape) > 1 else 1))


def _is_list_of_losses(made: Made) -> bool:
    return made.kind in _LISTS and any(origin is not None and origin.is_one_number for origin in made.origins)


# ---- sums of losses


def _joined(made: Made, batch_dim: int, summed: list[Summed]) -> LossFactor:
    """Return the factor of a sum of losses: the one that all of them have, without the weights that they are added
    with."""
    parts = _parts(made)
    at_targets = {_log_softmax(part, at_targets=True) for part in parts} - {None}
    counted = [part for part in parts if _log_softmax(part, at_targets=False) not in at_targets]
    factors = [_factor(part, batch_dim, summed)[0] for part in counted]
    for other in factors[1:]:
        factor = agreed(factors[0], other)
        if factor is None:
            raise unknown(
                made.node,
                f"it adds parts that are divided by different numbers, {factors[0].number:g} and {other.number:g}",
                "where one is a penalty, call set_loss() with the samples' own loss alone (and backward() on all), or ",
            )
        factors[0] = factor
    return factors[0]


def _parts(made: Made) -> list[Made]:
    """Return what a sum adds, without the weights; what it adds twice comes once."""
    found: list[Made] = []
    seen, todo = set(), [made]
    while todo:
        part = _unweighted(todo.pop())
        if part in seen:
            continue
        seen.add(part)
        if part.is_one_number and part.kind in ("Add", "Sub") and None not in part.origins:
            todo += [origin for origin in reversed(part.origins) if origin is not None]
        else:
            found.append(part)
    return found


def _unweighted(made: Made) -> Made:
    """Return what a part of a sum is without the constants that it is multiplied with."""
    while made.is_one_number and made.kind in (*SAME_VALUE, "Mul"):
        made = scaled(made)[0] if made.kind == "Mul" else made.origin
    return made


def _log_softmax(made: Made, *, at_targets: bool) -> Any:
    """Return of what, and along which dimension, that log-softmax is of which a part of a loss is a sum over the
    targets, or over all classes; None where it is no such sum."""
    reduced = False  # to one term per target
    while True:
        kind = made.kind
        if kind == "LogSoftmax":
            dim = signed(saved(made.node, "dim")) % max(1, len(made.shape))
            return (made.origin, dim) if reduced else None
        per_target = kind in ((*OVER_WEIGHTS, "Gather") if at_targets else ("Sum", "Mean"))
        on_the_way = kind in _PER_ELEMENT or (kind in ("Sum", "Mean") and made.is_one_number)
        reduced |= per_target
        if not per_target and not on_the_way:
            return None
        found = [origin for origin in made.origins if origin is not None]
        if len(found) != 1:
            return None
        (made,) = found
