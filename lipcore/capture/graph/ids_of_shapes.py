"""Whose the gradient behind nodes is that change a tensor's shape: views, transpositions, slices, joins, reductions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipcore.capture.graph.ids_step import NOBODY, Step, dim_of, integer, is_one, placed
from lipcore.models.torch_internals import saved


def along(step: Step, ids: Tensor) -> Tensor | None:
    """Return the ids behind a node that joins or chooses along a dimension, of a tensor with as many."""
    return ids if is_one(ids, [dim_of(step, ids.dim())]) else None


def reduced(step: Step, ids: Tensor) -> Tensor | None:
    dims = saved(step.node, "dim")
    if not ids.dim():
        return ids.reshape([1] * len(step.shape))
    if ids.dim() != len(step.shape):
        for d in sorted(integer(d) % len(step.shape) for d in ([dims] if isinstance(dims, int) else dims)):
            ids = ids.unsqueeze(d)
    return ids if ids.dim() == len(step.shape) else None


def viewed(step: Step, ids: Tensor) -> Tensor | None:
    out, shape = step.outs[0], step.shape
    if ids.numel() == 1:
        return ids.reshape([1] * len(shape))
    if not ids.numel():
        return ids.new_full([1] * len(shape), NOBODY)
    for k in range(max(d for d, size in enumerate(ids.shape) if size > 1) + 1, len(out) + 1):
        tail = math.prod(out[k:])  # dimensions at the end that are one sample's, in both
        end = next((j for j in range(len(shape) + 1) if math.prod(shape[j:]) == tail), None)
        if end is not None:
            front = ids.reshape(ids.shape[:k]).expand(out[:k]).reshape(shape[:end])
            return front.reshape(*shape[:end], *[1] * (len(shape) - end))
    return None


def transposed(step: Step, ids: Tensor) -> Tensor | None:
    if ids.dim() < 2:
        return ids
    dims = [saved(step.node, name) for name in ("dim0", "dim1")]
    return ids.transpose(*(integer(d) if isinstance(d, int) else i for i, d in enumerate(dims)))


def permuted(step: Step, ids: Tensor) -> Tensor | None:
    order = [integer(d) % ids.dim() for d in saved(step.node, "dims")]
    return ids.permute([order.index(d) for d in range(len(order))])


def sliced(step: Step, ids: Tensor) -> Tensor | None:
    dim = dim_of(step, ids.dim())
    if dim == ids.dim() - 1 and is_one(ids, [dim]):
        return ids
    bounds = (saved(step.node, name) for name in ("start", "end", "step"))
    taken = slice(*(bound if bound is None else integer(bound) for bound in bounds))
    return placed(ids, torch.arange(step.shape[dim], device="cpu")[taken], dim, step.shape[dim])


def selected(step: Step, ids: Tensor) -> Tensor | None:
    dim = dim_of(step, len(step.shape))
    index = integer(saved(step.node, "index")) % step.shape[dim]
    return placed(ids.unsqueeze(dim), torch.tensor([index], device="cpu"), dim, step.shape[dim])


def of_split(step: Step) -> Tensor | None:
    return _of_parts(step, [out[dim_of(step, len(step.shape))] for out in step.outs])


def of_unbind(step: Step) -> Tensor | None:
    dim = dim_of(step, len(step.shape))
    parts = [None if ids is None else ids.unsqueeze(dim) for ids in step.ids]
    return _of_parts(step._replace(ids=parts), [1] * len(parts))


def _of_parts(step: Step, sizes: list[int]) -> Tensor | None:
    dim = dim_of(step, len(step.shape))
    parts = [ids for ids in step.ids if ids is not None]
    if len(parts) < len(step.ids):
        return None
    if all(is_one(ids, [dim]) and torch.equal(ids, parts[0]) for ids in parts):
        return parts[0]
    wide = [max(sizes) for sizes in zip(*([*ids.shape[:dim], 1, *ids.shape[dim + 1 :]] for ids in parts), strict=True)]
    each = [ids.expand(*wide[:dim], n, *wide[dim + 1 :]) for ids, n in zip(parts, sizes, strict=True)]
    return torch.cat(each, dim)


def padded(step: Step, ids: Tensor) -> Tensor | None:
    pads = [integer(pad) for pad in saved(step.node, "pad")]
    for dim, before, after in zip(range(ids.dim() - 1, -1, -1), pads[::2], pads[1::2], strict=False):
        if is_one(ids, [dim]):
            continue
        if min(before, after) < 0:
            return None
        ids = ids.narrow(dim, before, step.shape[dim])
    return ids


def joined(step: Step, ids: Tensor) -> Tensor | None:
    dim = dim_of(step, ids.dim())
    if is_one(ids, [dim]):
        return ids
    before = step.others[: step.edge]
    if any(shape is None for shape in before):
        return None
    return ids.narrow(dim, sum(shape[dim] for shape in before if shape is not None), step.shape[dim])


def stacked(step: Step, ids: Tensor) -> Tensor | None:
    dim = dim_of(step, ids.dim())
    return ids.select(dim, 0 if is_one(ids, [dim]) else step.edge)
