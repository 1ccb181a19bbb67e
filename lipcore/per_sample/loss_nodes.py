"""Nodes of a loss's graph, and the constants that they keep."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipcore.models.torch_internals import forward_kind, forward_shape, is_packed, saved
from lipcore.per_sample.loss_factor import of_host

#: Losses that average over all elements of their input, over its first dimension, and over weights that they keep;
#: their nodes keep whether they have reduced at all.
OVER_ELEMENTS = (
    *("MseLoss", "SmoothL1Loss", "HuberLoss", "SoftMarginLoss"),
    *("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"),
)
OVER_SAMPLES = ("MultiMarginLoss", "MultilabelMarginLoss")
OVER_WEIGHTS = ("NllLoss", "NllLoss2D")
#: Operations that leave the value as it is, but for its sign, shape, dtype and a constant that is added.
SAME_VALUE = (
    *("Clone", "ToCopy", "Alias", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Neg"),
    *("Rsub", "_DDPSink"),  # a constant minus the loss; what DistributedDataParallel returns its outputs through
)
#: Operations that add a constant to one of their operands, which they may multiply with another one first.
ADDED = ("Add", "Sub", "Rsub")


@functools.lru_cache
def _kind_of(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


class Made(NamedTuple):
    """A tensor in the graph: the node that has made it, and the number of that node's output."""

    node: Any
    place: int = 0

    @property
    def kind(self) -> str:
        return _kind_of(self.node.name())

    @property
    def shape(self) -> tuple[int, ...]:
        return forward_shape(self.node, self.place)

    @property
    def dtype(self) -> torch.dtype:
        return forward_kind(self.node, self.place)[0]

    @property
    def device(self) -> torch.device:
        return forward_kind(self.node, self.place)[1]

    @property
    def is_one_number(self) -> bool:
        return math.prod(self.shape) == 1

    @property
    def origins(self) -> list[Made | None]:
        """Those that it was made of; None for each that depends on nothing trained."""
        return [None if node is None else Made(node, place) for node, place in self.node.next_functions]

    @property
    def origin(self) -> Made:
        """The only one of them that depends on anything trained."""
        if self.kind == "_DDPSink":  # takes all outputs, and returns them in this order
            return Made(*self.node.next_functions[self.place])
        found = [origin for origin in self.origins if origin is not None]
        if len(found) != 1:
            raise unknown(self.node, "several of what it joins depend on the model")
        return found[0]


class Summed(NamedTuple):
    """A tensor whose elements a loss sums up, or averages.

    Attributes:
        made: the tensor.
        dim: the batch's dimension, where the sum over this one alone is undone; None: that over all elements is.
    """

    made: Made
    dim: int | None = None


def scaled(made: Made) -> tuple[Made, str]:
    """Return what was multiplied with or divided by a constant, and the name that the node keeps the constant under."""
    first, *others = made.origins
    second = others[0] if others else None
    if (first is not None and second is not None) or (made.kind == "Div" and first is None):
        raise unknown(made.node, "both of what it joins depend on the model")
    if first is not None:
        return first, "other"
    return made.origin, "self"


def number(node: Any, name: str) -> float | Tensor:
    """Return the size of a constant that a node keeps. Its sign is the loss's own, as that of a minus in front of it:
    it is not undone."""
    constant = kept(node, name)
    if constant is None:
        raise unknown(node, "its constant was not kept")
    if isinstance(constant, Tensor) and constant.numel() != 1:
        raise unknown(node, f"its constant has shape {list(constant.shape)}")
    factor = of_host(constant) if isinstance(constant, Tensor) else float(constant)
    factor = factor.abs() if isinstance(factor, Tensor) else abs(factor)
    if not isinstance(factor, Tensor) and (factor == 0 or not math.isfinite(factor)):
        raise unknown(node, f"its constant is {factor}")
    return factor


def alpha(made: Made) -> float:
    """Return the size of what add(a, b, alpha=), sub() or rsub() have multiplied the only one with that depends on
    anything trained."""
    scales = made.kind == "Rsub" or made.origins[0] is None
    factor = saved(made.node, "alpha")
    return float(number(made.node, "alpha")) if scales and factor is not None else 1.0


def kept(node: Any, name: str) -> Any:
    if is_packed(node, name):
        why = "a checkpoint or saved_tensors_hooks have packed what it keeps"
        raise unknown(node, why, "compute the loss outside, or ")
    return saved(node, name)


def unknown(node: Any, why: str, remedy: str = "") -> ValueError:
    fixed = "pass loss_reduction='mean' or 'sum' with loss_terms= or scale= in place of 'auto'"
    return ValueError(f"loss: its graph has {node.name()}, and {why}; {remedy}{fixed}")


def dims_of(node: Any) -> list[int]:
    """Return the dimensions that a sum or a mean has removed."""
    return [signed(dim) for dim in saved(node, "dim") or ()]


def signed(number: int) -> int:
    """Return a number that nodes show without its sign."""
    return number - (1 << 64) if number >> 63 else number
