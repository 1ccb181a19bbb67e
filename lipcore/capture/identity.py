"""The two autograd Functions that pass an output on unchanged, to get at its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def passed_on(ctx: Any, output: Tensor, in_place_after: bool) -> Tensor:
    if in_place_after:
        # A view would make the in-place activation that may follow an error. This bumps the version counter, so it is
        # only right behind a module that does not need its output for its own backward. A compiler removes the copy;
        # what it makes of a view that was marked is wrong once sizes are symbols.
        if torch.compiler.is_compiling() or (output._is_view() and type(output) is not Tensor):
            return output.clone()
        if output._is_view():
            # The same memory, but no view in autograd's eyes: what mark_dirty makes of a tensor that is none. Linears
            # of three dimensions return views; copies of them would be a fifth of a transformer's memory.
            alias = output.new_empty(0)
            return alias.set_(output.untyped_storage(), output.storage_offset(), output.shape, output.stride())
        ctx.mark_dirty(output)
        return output
    return output.view_as(output)
