"""What a loss was divided by: before it was set, as its own graph says, and after, as its gradient says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lipcore.models.torch_internals import forward_shape, saved
from lipcore.per_sample.loss_factor import LossFactor, of_host, product

_REDUCTIONS = ("none", "mean", "sum")  # by torch's numbers
#: Losses that average over all elements of their input, over its first dimension, and over weights that they keep.
_OVER_ELEMENTS = (
    *("MseLoss", "SmoothL1Loss", "HuberLoss", "SoftMarginLoss"),
    *("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"),
)
_OVER_SAMPLES = ("MultiMarginLoss", "MultilabelMarginLoss")
_OVER_WEIGHTS = ("NllLoss", "NllLoss2D")
_SAME_VALUE = ("Clone", "ToCopy", "Alias", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Neg")
_SUMS = ("Sum", "Nansum", "Dot")
_LISTS = ("Stack", "Cat")


def own_loss(output: Any) -> SetLoss | None:
    """Return the loss that a model returns among other things, by the name that trainers look for; None where there is
    none whose factor is known."""
    try:
        named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        return SetLoss(named) if isinstance(named, Tensor) and not isinstance(output, Tensor) else None
    except Exception:  # nobody has asked for this one, and nothing may be raised in the forward pass
        return None


class SetLoss:
    """A loss whose graph was read before its backward pass, and the gradient with which that pass comes to it: what
    was done to the loss afterwards (1/k of a trainer that accumulates, a GradScaler's scale).

    Raises:
        TypeError, ValueError: as :func:`read_factor`.
    """

    def __init__(self, loss: Tensor) -> None:
        self._read = read_factor(loss)
        self._gradient: Tensor | None = None
        loss.register_hook(self._keep)

    def _keep(self, gradient: Tensor) -> None:
        self._gradient = gradient.detach().clone()

    def contradicts(self, given: LossFactor, terms: float | Tensor) -> bool:
        """Return whether the host knows that the factor of the backward pass is not the given one, which was made of so
        many terms: by the numbers, or since terms that lie on a device are not in the loss's graph."""
        found = self.factor()
        if found is None:
            return False
        if found.tensor is None and given.tensor is None:
            return not math.isclose(found.number, given.number, rel_tol=1e-5)
        return isinstance(terms, Tensor) and self._read.tensor is None

    def factor(self) -> LossFactor | None:
        """Return the factor of the backward pass; None where that did not come to this loss."""
        if self._gradient is None:
            return None
        by = of_host(self._gradient)
        inverse = by.reciprocal() if isinstance(by, Tensor) else 1 / by if by else math.nan
        return product(self._read.number, inverse, *self._read.tensors)


def read_factor(loss: Tensor) -> LossFactor:
    r"""Return f with :math:`\nabla l_i = f \cdot` (what the backward pass of this loss brings of sample i), l_i being
    the sum of sample i's loss terms before the reduction to one number.

    The graph is followed from the loss back to that reduction: constants that it was multiplied with or divided by on
    the way are undone, and so is a mean, by the number (or the weight) of its terms.

    Raises:
        TypeError: no tensor.
        ValueError: not one number, no graph, or an operation in it whose factor is not known; the message names it.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected the loss, a tensor with a graph, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.grad_fn is None:
        what = "has no graph" if loss.grad_fn is None else f"has shape {list(loss.shape)}"
        raise ValueError(
            f"loss: expected the one number that backward() is called on, before it is; this tensor {what}"
        )
    parts: list[float | Tensor] = []
    node: Any = loss.grad_fn
    while node is not None and _is_one_number(node):
        node = _step(node, parts)
    return product(1.0, *parts)


def _is_one_number(node: Any) -> bool:
    return math.prod(forward_shape(node)) == 1


def _step(node: Any, parts: list[float | Tensor]) -> Any:
    """Add what this operation has done to the factor, and return the node in front of it; None after the reduction."""
    kind = node.name().rstrip("0123456789").removesuffix("Backward")
    children = [(child, index) for child, index in node.next_functions]
    if kind in _SAME_VALUE:
        return children[0][0]
    if kind in ("Mul", "Div"):
        return _scaled(kind, node, children, parts)
    if kind in ("Add", "Sub"):
        if children[0][0] is None or (len(children) > 1 and children[1][0] is not None):
            raise _unknown(node, "it adds parts that each have a factor of their own (a penalty, a second loss)")
        return children[0][0]
    if kind == "Mean" or kind in _SUMS:
        inner, index = children[0]
        if _is_list_of_losses(inner):
            raise _unknown(inner, "it joins losses that were reduced before")
        shape = forward_shape(inner, index)
        if kind == "Mean":
            parts.append(float(math.prod(shape)))
        return inner if shape == () else None  # of one number it was no reduction
    if kind in (*_OVER_ELEMENTS, *_OVER_SAMPLES, *_OVER_WEIGHTS):
        parts.append(_terms(kind, node, *children[0]))
        return None
    raise _unknown(node, "what it does to the factor is not known")


def _scaled(kind: str, node: Any, children: list[tuple[Any, int]], parts: list[float | Tensor]) -> Any:
    """Take a constant out that the loss was multiplied with or divided by."""
    first, second = children[0][0], children[1][0] if len(children) > 1 else None
    by, inner = (saved(node, "other"), first) if first is not None else (saved(node, "self"), second)
    if (first is not None and second is not None) or by is None or (kind == "Div" and first is None):
        raise _unknown(node, "both of what it joins depend on the model")
    factor = of_host(by) if isinstance(by, Tensor) else float(by)
    if not isinstance(factor, Tensor) and (factor == 0 or not math.isfinite(factor)):
        raise _unknown(node, f"its constant is {factor}")
    parts.append(factor if kind == "Div" else factor.reciprocal() if isinstance(factor, Tensor) else 1 / factor)
    return inner


def _terms(kind: str, node: Any, inner: Any, index: int) -> float | Tensor:
    """Return how many terms a loss function has averaged, or their weight."""
    if _REDUCTIONS[saved(node, "reduction")] != "mean":
        return 1.0
    if kind in _OVER_WEIGHTS:
        return of_host(saved(node, "total_weight"))
    shape = forward_shape(inner, index)
    return float(math.prod(shape) if kind in _OVER_ELEMENTS else (shape[0] if len(shape) > 1 else 1))


def _is_list_of_losses(node: Any) -> bool:
    kind = node.name().rstrip("0123456789").removesuffix("Backward")
    children = [child for child in node.next_functions if child[0] is not None]
    return kind in _LISTS and any(math.prod(forward_shape(*child)) == 1 for child in children)


def _unknown(node: Any, why: str) -> ValueError:
    return ValueError(
        f"loss: its graph has {node.name()}, and {why}; pass loss_reduction='mean' or 'sum' with loss_terms= or scale= "
        "in place of 'auto'"
    )
