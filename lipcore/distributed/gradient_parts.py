"""What of a gradient belongs to the part of its parameter that this rank holds. torch may leave a gradient that lies
otherwise on the ranks than its parameter does: whole on each for an embedding that is cut (RowwiseParallel), as sums
that nobody has added up yet for a norm that all hold (SequenceParallel)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lipcore.models.dtensors import local_of
from lipcore.models.torch_internals import shard_of


def gradient_part(parameter: Any, gradient: Any) -> Tensor | None:
    """Return what a gradient has of the elements of its parameter that this rank holds, a plain tensor, strided where
    it was cut out of a larger one; None where that is not known without the other ranks, which is so on all of them.
    No collective and no copy."""
    own: Any = getattr(parameter, "placements", None)
    its: Any = getattr(gradient, "placements", None)
    if own is None and its is None:
        return gradient  # type: ignore[no-any-return]
    if own is None:  # whole here
        whole = all(each.is_replicate() or gradient.device_mesh.size(i) == 1 for i, each in enumerate(its))
        return local_of(gradient) if whole else None
    mesh = parameter.device_mesh
    if its is None or (gradient.device_mesh is not mesh and gradient.device_mesh != mesh):
        return None  # what other ranks have is not said
    if own == its:
        return local_of(gradient)
    cut = _to_cut(mesh, own, its)
    if cut is None:
        return None
    part = local_of(gradient)
    shape, offset = shard_of(parameter) if cut else ((), ())
    for dim in cut:
        part = part.narrow(dim, min(offset[dim], part.shape[dim]), shape[dim])
    return part


def why_not_known(name: str, parameter: Any, gradient: Any, *, hooks: bool = True) -> str:
    """Return why :func:`gradient_part` has nothing of a gradient, in words, and what would help; `hooks`: a hook on the
    parameter does."""
    lies, belongs = (_placement(tensor) for tensor in (gradient, parameter))
    why = (
        f"the gradient of parameter '{name}' is {lies}, and the parameter is {belongs}, so that no rank knows its part "
        "of the gradient alone"
    )
    if not hasattr(gradient, "placements"):
        return f"{why}. Make it a DTensor placed as the parameter"
    if not hooks:
        return f"{why}. fully_shard() beside the plan has it added up; or pass noise_scale=False"
    return (
        f"{why}. Have it redistributed in the backward pass: pass parameter.register_post_accumulate_grad_hook() a "
        "function that sets parameter.grad = parameter.grad.redistribute(placements=parameter.placements)"
    )


def _to_cut(mesh: Any, own: Any, its: Any) -> set[int] | None:
    """Return the dimensions of which a gradient has everything and its parameter a part; None where the gradient lies
    in yet another way. It follows from the placements alone, which all ranks have alike."""
    cut, kept = set(), set()
    for i, (mine, other) in enumerate(zip(own, its, strict=True)):
        if mesh.size(i) == 1:
            continue  # all there is of it is here, by whatever name
        if mine == other:
            kept.add(getattr(mine, "dim", None))
        elif other.is_replicate() and mine.is_shard():
            cut.add(mine.dim)
        else:
            return None
    return None if cut & kept else cut  # a part of a part need not be inside another one


def _placement(tensor: Any) -> str:
    placements = getattr(tensor, "placements", None)
    return "a plain tensor" if placements is None else f"placed as ({', '.join(map(repr, placements))})"
