"""What was done to the samples' terms over the batch before the last reduction of a loss, as in x.mean(0).sum()."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lipcore.models.torch_internals import saved
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
    dims_of,
    kept,
    number,
    signed,
    unknown,
)

_GROUPS = ("IndexAdd", "ScatterAdd", "IndexReduce", "ScatterReduce", "SegmentReduce")
_LOSSES = (*OVER_ELEMENTS, *OVER_SAMPLES, *OVER_WEIGHTS)
_PRODUCTS = ("Mm", "Mv", "Bmm")
#: What brings terms of several tensors together, or some of one.
_JOINS = ("Cat", "Stack", "CopySlices", "IndexPut", "Slice", "Select", "Index", "IndexSelect", "Gather", "Repeat")
_PER_TERM = ("Mul", "Div", "Expand", "MaskedFill", "Where", "Permute", "Transpose", "T")
_VIEWS = ("View", "UnsafeView", "ReshapeAlias")
_MOST = 64  # nodes that are looked at


def over_batch(made: Made, batch_dim: int, summed: list[Summed], seen: set[Made] | None = None) -> LossFactor | None:
    """Return what a tensor's terms were divided by on the way from where the batch's dimension was summed up or
    averaged; None where that is not found behind operations on single elements: the tensor has it still. What has it
    there is added to `summed`.

    Raises:
        ValueError: one part of a sum was reduced over the batch, and another was not, or otherwise.
    """
    seen = set() if seen is None else seen
    steps: list[tuple[str, Any]] = []  # undone if the batch turns out to be reduced behind them
    found: tuple[LossFactor, Made] | None = None
    partly: set[bool] = set()  # whether the batch's dimension was among some that were reduced, and others were not
    while made not in seen and len(seen) < _MOST:
        seen.add(made)
        kind, origins = made.kind, [origin for origin in made.origins if origin is not None]
        if kind in ("Add", "Sub") and len(origins) == 2:
            below = _of_sum(made, [over_batch(origin, batch_dim, summed, seen) for origin in origins])
            if below is not None:
                return product(below.number, *_undone(steps))
            break
        if kind in _GROUPS:
            raise unknown(made.node, "it sums up groups of terms, which may be of several samples")
        if len(origins) != 1:
            break
        if kind in ("Mean", "Sum"):
            shape = origins[0].shape
            dims = {dim % len(shape) for dim in dims_of(made.node)} if shape else set()
            steps.append((kind, math.prod(shape[dim] for dim in dims)))
            partly |= {dim == batch_dim for dim in dims} if len(dims) < len(shape) else set()
            if batch_dim in dims:
                found = product(1.0, *_undone(steps)), origins[0]
        elif kind == "Mul" or (kind == "Div" and made.origins[0] is not None):
            steps.append((kind, (made.node, "self" if made.origins[0] is None else "other")))
        elif partly and _moves_batch(made, origins[0], batch_dim, over=True in partly):
            raise unknown(made.node, "it moves the batch's dimension before a part of the dimensions is reduced")
        elif kind not in (*SAME_VALUE, "Add", "Sub"):
            break
        if kind in ADDED:
            steps.append((kind, alpha(made)))
        (made,) = origins
    if found is None:
        return None
    summed.append(Summed(found[1], batch_dim))
    return found[0]


def check_terms(made: Made, batch_dim: int) -> None:
    """Look at what is summed up last, through operations that join, pick or scale its terms.

    Raises:
        ValueError: terms in it were summed up or averaged over the batch before, so that they are no sample's.
    """
    todo, seen = [(made, False)], set[Made]()
    while todo and len(seen) < _MOST:
        now, picked = todo.pop()
        if now in seen:
            continue
        seen.add(now)
        kind, origins = now.kind, [origin for origin in now.origins if origin is not None]
        reduces = kind in ("Mean", "Sum") or (kind in _LOSSES and saved(now.node, "reduction") != 0)
        shape = origins[0].shape if origins and kind in ("Mean", "Sum") else ()
        if reduces and now.is_one_number and now is not made and not _keeps_batch(now, shape, batch_dim):
            raise unknown(now.node, "several terms are made of its one number again, of which none is a sample's own")
        if picked and shape and batch_dim in {dim % len(shape) for dim in dims_of(now.node)}:
            raise unknown(now.node, "parts of what it has reduced over the batch are joined or picked")
        if kind in _PRODUCTS and len(now.origins) == 2 and now.origins[0] is None and not _is_leaf(origins):
            raise unknown(now.node, "it may sum up several samples' terms")
        if kind in (*_JOINS, *_PER_TERM, *SAME_VALUE, "Add", "Sub"):
            todo += [(origin, picked or kind in _JOINS) for origin in origins]


def _keeps_batch(made: Made, shape: tuple[int, ...], batch_dim: int) -> bool:
    """Return whether a sum or a mean of a tensor of this shape has left the batch's dimension, of a single sample."""
    dims = {dim % len(shape) for dim in dims_of(made.node)} if shape else set()
    return bool(dims) and batch_dim not in dims and len(shape) > batch_dim


def _is_leaf(origins: list[Made]) -> bool:
    """Return whether an operand is a parameter, perhaps transposed: the weight of a layer."""
    while origins and origins[-1].kind in ("T", "Transpose", *SAME_VALUE):
        origins = [origin for origin in origins[-1].origins if origin is not None]
    return bool(origins) and hasattr(origins[-1].node, "variable")


def _moves_batch(made: Made, origin: Made, batch_dim: int, *, over: bool) -> bool:
    """Return whether an operation brings the batch's dimension to another place, as far as its node says it; `over`:
    the dimension there is reduced later, and must be as long as before."""
    kind, node, dimensions = made.kind, made.node, max(1, len(origin.shape))
    if kind == "T":
        return True
    if kind == "Transpose":
        return batch_dim in {signed(saved(node, name)) % dimensions for name in ("dim0", "dim1")}
    if kind == "Permute":
        return signed(saved(node, "dims")[batch_dim]) % dimensions != batch_dim
    if kind == "Unsqueeze":
        return signed(saved(node, "dim")) % (dimensions + 1) <= batch_dim
    if kind in _VIEWS:
        if made.shape[: batch_dim + 1] == origin.shape[: batch_dim + 1]:
            return False
        # Tokens [B T] of a softmax cross-entropy as [B, T]: the gradient at the logits will confirm it.
        return over or not origin.kind.startswith("NllLoss")
    return kind in ("Index", "IndexSelect", "IndexAdd", "Slice", "Flip", "Roll") and over


def _of_sum(made: Made, parts: list[LossFactor | None]) -> LossFactor | None:
    first, second = parts
    if first is None and second is None:
        return None
    both = None if first is None or second is None else agreed(first, second)
    if both is None or both.tensors:  # numbers that only a device could compare
        raise unknown(made.node, "it adds parts that were reduced over the batch in different ways")
    return both


def _undone(steps: list[tuple[str, Any]]) -> list[float | Tensor]:
    """Return the factors that undo means and constants.

    Raises:
        ValueError: several numbers divide what was summed up over the batch.
    """
    factors: list[float | Tensor] = []
    for kind, what in steps:
        if kind == "Mean":
            factors.append(float(what))
        elif kind in ADDED:
            factors.append(1 / what)
        elif kind != "Sum":
            constant = kept(*what)
            if isinstance(constant, Tensor) and constant.numel() != 1:
                if kind == "Mul":
                    continue  # weights of the terms
                raise unknown(what[0], "several numbers divide what was summed up over the batch")
            factor = number(*what)
            factors.append(factor if kind == "Div" else 1 / factor)
    return factors
