"""Whose the gradient behind nodes is that take or put rows by index tensors, which the nodes have kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipcore.capture.graph.ids_step import NOBODY, Shape, Step, dim_of, is_one, narrowed, scattered, summed_to
from lipcore.models.torch_internals import saved


class _Indices(NamedTuple):
    """Index tensors of neighbouring dimensions: `places` of the rows that are taken, among `rows`, from dimension
    `first` on of `dims`."""

    places: Tensor
    first: int
    dims: int
    rows: int


def _indices(node: Any, shape: Shape) -> _Indices | None:
    """Return what `x[indices]` takes of an x of this shape."""
    kept = list(saved(node, "indices"))
    while kept and kept[-1] is None:
        kept.pop()
    first = next((i for i, index in enumerate(kept) if index is not None), 0)
    given = kept[first:]
    if not given or not all(isinstance(index, Tensor) for index in given):
        return None
    given = [index.cpu() for index in given]
    dims = sum(index.dim() if index.dtype in (torch.bool, torch.uint8) else 1 for index in given)
    rows = shape[first : first + dims]
    places = torch.arange(math.prod(rows), device="cpu").reshape(rows)[tuple(given)]
    return _Indices(places, first, dims, math.prod(rows))


def indexed(step: Step, ids: Tensor) -> Tensor | None:
    found = _indices(step.node, step.shape)
    if found is None:
        return None
    here = found.places.dim()
    before, after = ids.shape[: found.first], ids.shape[found.first + here :]
    if max(*before, *after, 1, 1) > 1:
        each_row = is_one(ids, range(found.first, found.first + here))
        return ids.reshape(*before, *[1] * found.dims, *after) if each_row else None
    each = ids.reshape(ids.shape[found.first : found.first + here]).expand(found.places.shape)
    rows = scattered(each.flatten(), found.places.flatten(), found.rows)
    if rows is None:
        return None
    return rows.reshape(*before, *step.shape[found.first : found.first + found.dims], *after)


def put(step: Step, ids: Tensor) -> Tensor | None:
    if step.edge == 0:
        return ids
    found = _indices(step.node, step.outs[0])
    if found is None:
        return None
    before, after = ids.shape[: found.first], ids.shape[found.first + found.dims :]
    block = ids.shape[found.first : found.first + found.dims]
    if max(*block, 1, 1) == 1:
        return summed_to(ids.reshape(*before, *[1] * found.places.dim(), *after), step.shape)
    if max(*before, *after, 1, 1) > 1:
        return None
    each = ids.reshape(block).expand(step.outs[0][found.first : found.first + found.dims]).flatten()[found.places]
    return summed_to(each.reshape(*before, *found.places.shape, *after), step.shape)


def masked(step: Step, ids: Tensor) -> Tensor | None:
    """Return the ids behind a masked_scatter: its source's elements stand in the mask's places, one after the other."""
    if step.edge == 0:
        return summed_to(ids, step.shape)
    out, source = step.outs[0], step.shape
    mask = saved(step.node, "mask").cpu().expand(out)
    whole = mask.narrow(-1, 0, 1)  # of rows, mostly
    if source and ids.shape[-1] == 1 and source[-1] == out[-1] and bool((mask == whole).all()):
        mask, out, source = whole, (*out[:-1], 1), (*source[:-1], 1)
    found, taken = ids.new_full([math.prod(source)], NOBODY), ids.expand(out)[mask]
    if len(taken) > len(found):
        return None
    found[: len(taken)] = taken
    return narrowed(found.reshape(source))


def added_at(step: Step, ids: Tensor) -> Tensor | None:
    dim = dim_of(step, ids.dim())
    if step.edge == 0 or is_one(ids, [dim]):
        return ids
    return ids.index_select(dim, saved(step.node, "index").cpu())


def taken(step: Step, ids: Tensor) -> Tensor | None:
    dim = dim_of(step, ids.dim())
    if is_one(ids, [dim]):
        return ids
    if ids.numel() != ids.shape[dim]:
        return None
    rows = scattered(ids.flatten(), saved(step.node, "index").cpu(), step.shape[dim])
    return None if rows is None else rows.reshape([-1 if d == dim else 1 for d in range(ids.dim())])


def _same_index(step: Step, ids: Tensor) -> tuple[int, Tensor | None]:
    """Return the dimension of a gather or scatter, and its index where that is the same all along the others."""
    dim, index = dim_of(step, ids.dim()), saved(step.node, "index").cpu()
    if not index.numel():
        return dim, None
    for d in range(index.dim()):
        if d == dim:
            continue
        first = index.narrow(d, 0, 1)
        if index.stride(d) != 0 and bool((index != first).any()):
            return dim, None
        index = first
    return dim, index.flatten()


def gathered(step: Step, ids: Tensor) -> Tensor | None:
    others = [d for d in range(ids.dim()) if d != dim_of(step, ids.dim())]
    if any(step.outs[0][d] != step.shape[d] for d in others):
        return None
    if is_one(ids, [dim_of(step, ids.dim())]):
        return ids
    dim, index = _same_index(step, ids)
    rows = None if index is None or not is_one(ids, others) else scattered(ids.flatten(), index, step.shape[dim])
    return None if rows is None else rows.reshape([-1 if d == dim else 1 for d in range(ids.dim())])


def scatter(step: Step, ids: Tensor) -> Tensor | None:
    if step.edge == 0:
        return ids
    others = [d for d in range(ids.dim()) if d != dim_of(step, ids.dim())]
    if any(step.outs[0][d] != step.shape[d] for d in others):
        return None
    if is_one(ids, [dim_of(step, ids.dim())]):
        return ids
    dim, index = _same_index(step, ids)
    return ids.index_select(dim, index) if index is not None and len(index) == step.shape[dim] else None
