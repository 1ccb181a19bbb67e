"""W_1 of which ranks hold parts: what each of them adds to the reduce, so that all know its singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.lipschitz.first_weight import twin_of, unknown
from lipcore.lipschitz.singular_values import SVD_LIMIT, SingularValues, singular_values
from lipcore.metric.later import Later
from lipcore.models.dtensors import local_of
from lipcore.models.torch_internals import shard_of

#: Numbers that are added up unasked: those of W_1^T W_1 of so many inputs.
UNASKED = SVD_LIMIT * (SVD_LIMIT + 1) // 2
#: Of an eigenvalue of W_1^T W_1 to the largest: what is less is not known to 1e-6 of itself.
_SMALLEST = 1e-7
_LINEAR, _CONVOLUTIONS = nn.Linear, (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class WeightInParts:
    """This rank's part of a first layer's weight, as it was when a window closed.

    Ranks add up the smallest of what gives the singular values: of parts by rows (of outputs) :math:`W_1^\\top W_1`, of
    parts by columns (of inputs) :math:`W_1 W_1^\\top`, or, with zeros for what other ranks hold, W_1 itself. A
    convolution's own matrix is much larger than its weight, which is therefore what is added up.

    Attributes:
        name: of the parameter.
        layer: its module.
        shape: of the whole weight.
        offset: of the part in it.
        part: a copy.
        way: "inner", "outer" or "whole".
        asked: whatever it costs.
        batch_shape: of the layer's input on this rank.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    part: Tensor
    way: str
    asked: bool
    batch_shape: tuple[int, ...] | None
    off: str = ""  #: why the ranks cannot take it together

    @classmethod
    def of(
        cls, name: str, layer: nn.Module, weight: Any, batch_shape: tuple[int, ...] | None, *, asked: bool
    ) -> WeightInParts:
        """Return the part of a weight that is a DTensor; no collective."""
        shape, offset, way = tuple(weight.shape), shard_of(weight)[1], way_of(layer, weight)
        part = local_of(weight).detach()
        part = part.new_empty(0) if refusal(shape, way, asked=asked) else part.clone()
        return cls(name, layer, shape, tuple(offset), part, way, asked, batch_shape)

    @property
    def numbers(self) -> int:
        """Number of what ranks add up."""
        return numbers_of(self.shape, self.way)

    @property
    def agreed(self) -> list[Any]:
        """Facts that have to be the same on all ranks, JSON-ready."""
        return [self.name, list(self.shape), self.way]

    @property
    def inputs(self) -> list[int] | None:
        """The shape of a sample, where a convolution's singular values depend on it; None where no sample came."""
        if isinstance(self.layer, _LINEAR):
            return []
        return None if self.batch_shape is None else list(self.batch_shape[1:])

    def hear(self, inputs: list[list[int] | None]) -> None:
        """Take the shapes of all ranks' samples."""
        found = [each for i, each in enumerate(inputs) if each is not None and each not in inputs[:i]]
        if len(found) > 1:
            self.off = f"ranks have samples of the shapes {found[0]} and {found[1]}, and W_1 is another map on each"
        elif not found:
            self.off = "no sample has shown the shape of the convolution's input"
        else:
            self.batch_shape = (1, *found[0])

    @property
    def refused(self) -> str:
        """Reason why the ranks do not take it; "" where they do. The same on all ranks, by what these agree on."""
        return refusal(self.shape, self.way, asked=self.asked)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept until the ranks meet."""
        return self.part.numel() * self.part.element_size()

    def addend(self, *, counts: bool) -> Tensor:
        """Return what this rank adds, float64 on the CPU; zeros where another one `counts` its part."""
        if self.refused:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        if not counts or not self.part.numel():
            return torch.zeros(self.numbers, dtype=torch.float64, device="cpu")
        # A device that training has filled would raise here, where the other ranks are in the reduce already.
        part = self.part.cpu().double()
        if self.way == "whole":
            whole = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
            into = whole
            for dim, (begin, size) in enumerate(zip(self.offset, part.shape, strict=True)):
                into = into.narrow(dim, begin, size)
            into.copy_(part)
            return whole.reshape(-1)
        gram = part.T @ part if self.way == "inner" else part @ part.T
        row, column = torch.tril_indices(*gram.shape, device="cpu")
        return gram[row, column]

    def singular_values(self, total: Tensor) -> Later[SingularValues]:
        """Return the singular values, of what all ranks' addends come to, to be computed when they are read."""
        reason = self.refused or self.off
        if reason:
            return Later(lambda: unknown(reason))
        batch_shape, shape = self.batch_shape, self.shape
        twin = twin_of(self.layer, total.reshape(shape)) if self.way == "whole" else None  # not the layer: it is kept

        def taken() -> SingularValues:
            try:
                if twin is None:
                    return _of_gram(total, shape)
                found = singular_values(twin, batch_shape)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # who reads a window cannot do anything about it
                return unknown(f"singular values of W_1 could not be taken: {error}")
            assert found is not None
            return found

        return Later(taken, 8 * total.numel(), unknown)


def is_in_parts(layer: nn.Module | None, weight: Any) -> bool:
    """Return whether the weight of a layer that has singular values is a DTensor."""
    return isinstance(layer, (_LINEAR, *_CONVOLUTIONS)) and hasattr(weight, "placements")


def numbers_of(shape: tuple[int, ...], way: str) -> int:
    """Return how many numbers ranks add up in this way."""
    side = {"inner": shape[1], "outer": shape[0]}.get(way, 0)
    return side * (side + 1) // 2 if side else math.prod(shape)


def way_of(layer: nn.Module, weight: Any) -> str:
    """Return the way with the fewest numbers, of those that add up where a DTensor is cut as this one is."""
    ways = ["whole"]
    if isinstance(layer, _LINEAR):
        cut = {placement.dim for placement in weight.placements if not placement.is_replicate()}
        ways += ["inner"] if cut <= {0} else []
        ways += ["outer"] if cut <= {1} else []
    return min(ways, key=lambda way: numbers_of(tuple(weight.shape), way))


def refusal(shape: tuple[int, ...], way: str, *, asked: bool) -> str:
    """Say why ranks do not add up what gives the singular values; "" where they do."""
    numbers = numbers_of(shape, way)
    if asked or numbers <= UNASKED:
        return ""
    return (
        f"ranks hold parts of W_1 {list(shape)}, and would add up {numbers:,} numbers in each window for its singular "
        f"values ({8e-6 * numbers:.3g} MB; up to {8e-6 * UNASKED:.3g} MB are taken unasked): pass Lipschitz(sigma=True)"
    )


def _of_gram(total: Tensor, shape: tuple[int, ...]) -> SingularValues:
    """Return the singular values of a matrix of this shape from one triangle of W^T W or W W^T."""
    size = math.isqrt(2 * total.numel())
    gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    row, column = torch.tril_indices(size, size, device="cpu")
    gram[row, column] = total
    if not bool(gram.isfinite().all()):
        return unknown("W_1 is not finite")
    values = torch.linalg.eigvalsh(gram)  # reads the lower triangle
    largest = math.sqrt(max(float(values[-1]), 0.0))
    least = float(values[size - min(shape)])
    rule = "eigenvalues of the Gram matrix that ranks have added up"
    if least < _SMALLEST * float(values[-1]) or not largest:
        return SingularValues(largest, None, f"{rule}, in which the smallest one is lost", largest)
    return SingularValues(largest, math.sqrt(least), rule, largest)
