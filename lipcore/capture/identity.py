"""What the autograd Functions have in common that pass an output on unchanged, to get at its gradient."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor

from lipcore.models.torch_internals import in_selective_checkpoint

#: Whether an in-place operation may follow: never (a view), always (the same memory), or on a copy.
InPlaceAfter = Literal[False, True, "copy"]


def same_memory(x: Tensor) -> Tensor:
    """Return a tensor with the same memory that is no view of x in autograd's eyes; a copy where x is what its memory
    holds with another sign (the imaginary part of a conjugate)."""
    if x.is_neg() or x.is_conj():
        return x.clone().resolve_neg().resolve_conj()
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def passed_on(ctx: Any, output: Tensor, in_place_after: InPlaceAfter) -> Tensor:
    """Return an output as a Function's that autograd takes for a new tensor, where that is needed."""
    if hasattr(output, "placements"):  # its hooks may make a plain tensor of it, which what follows may write into
        return output.view_as(output)
    if in_place_after == "copy":
        return output.clone()
    if in_place_after:
        # A view would make the in-place activation that may follow an error. This bumps the version counter, so it is
        # only right behind a module that does not need its output for its own backward. A compiler removes the copy;
        # what it makes of a view that was marked is wrong once sizes are symbols.
        if torch.compiler.is_compiling() or (output._is_view() and type(output) is not Tensor):
            return output.clone()
        if in_selective_checkpoint():  # which has kept the output, in the version that it has now
            return output.view_as(output)
        if output._is_view():
            # The same memory, but no view in autograd's eyes: what mark_dirty makes of a tensor that is none. Linears
            # of three dimensions return views; copies of them would be a fifth of a transformer's memory.
            return same_memory(output)
        ctx.mark_dirty(output)
        return output
    return output.view_as(output)


class PassedOn(torch.autograd.Function):
    """The Function on an output in a pass of lipcore's own, whose graph is to be like that of a pass that is tapped."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, in_place_after: InPlaceAfter) -> Tensor:
        return passed_on(ctx, output, in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Alias(torch.autograd.Function):
    """The Function that returns :func:`same_memory` of x, which requires a gradient by way of the anchor; x itself gets
    the gradient that it would get anyway.

    No view in autograd's eyes, and no leaf: the model may work on it in place. `mark_dirty` would change the user's own
    tensor, and a detached copy would cut off what made it (a generator before a discriminator).

    Attributes:
        given: a weak reference to x, by which an argument of a call is known again, as the alias is by its node.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.given = weakref.ref(x)
        return same_memory(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad if ctx.needs_input_grad[0] else None), None
