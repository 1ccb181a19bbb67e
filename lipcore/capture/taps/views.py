"""Outputs that are views of other tensors: where their gradient is to be had when they are changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The elements of a tensor that a view of it shows, each of them once."""

    whole_shape: Sequence[int]
    whole_stride: Sequence[int]
    shape: Sequence[int]
    stride: Sequence[int]
    offset: int

    def of(self, grad: Tensor) -> Tensor:
        """Return the gradient at the view, given the one at the tensor, which no other view of it reaches."""
        if grad.stride() != self.whole_stride:
            grad = torch.empty_strided(
                *(self.whole_shape, self.whole_stride), dtype=grad.dtype, device=grad.device
            ).copy_(grad)
        return grad.as_strided(self.shape, self.stride, grad.storage_offset() + self.offset)


def behind_in_place(output: Tensor) -> tuple[Tensor, Part | None]:
    """Return the tensor whose node stays where it is when an output is changed in place, and which part of it the
    output is; None: all of it.

    Of a view it is the tensor that it is of, since the change puts a node of its own in the place of the view's; but
    the view itself where its elements' gradients are not to be had there: a function of its own makes it of a tensor
    that no gradient passes (what to_local() returns of a DTensor), or it shows elements several times or as other
    numbers.
    """
    base = output._base if output._is_view() else None
    if base is None or base.grad_fn is None or base.dtype != output.dtype or _shows_some_twice(output):
        return output, None
    offset = int(output.storage_offset() - base.storage_offset())
    return base, Part(base.shape, base.stride(), output.shape, output.stride(), offset)


def _shows_some_twice(view: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
