"""Frontier nodes whose per-sample gradients have a closed form, from what the node keeps: nothing is run again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.graph.rows import Order
from lipcore.layers import Factor, Outer, RowSum, Stacked
from lipcore.models.torch_internals import saved


@dataclass(frozen=True)
class SampleRows:
    """The rows of a gradient at the frontier.

    Attributes:
        dim: where they are.
        ids: the sample of each, int64 [N]; negative where no gradient comes to it.
        samples: B.
    """

    dim: int
    ids: Tensor
    samples: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a tensor's rows as [B, T, ...], or packed [N, ...] with the offsets of the samples."""
        x, each = x.movedim(self.dim, 0), len(self.ids) // self.samples
        if self._order is Order.BLOCKS:
            return x.reshape(self.samples, each, *x.shape[1:]), None
        if self._order is Order.TURNS:
            return x.reshape(each, self.samples, *x.shape[1:]).transpose(0, 1), None
        places, offsets = self._places
        return x.index_select(0, places.to(x.device)), offsets.to(x.device)

    @cached_property
    def _order(self) -> Order | None:
        if not len(self.ids) or len(self.ids) % self.samples:
            return None
        orders = (Order.BLOCKS, Order.TURNS)
        return next((o for o in orders if torch.equal(self.ids, o.samples(len(self.ids), self.samples))), None)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The rows' places sample by sample, without nobody's, and the offsets of the samples."""
        bounds = torch.bincount(self.ids + 1, minlength=self.samples + 1).cumsum(0)
        return self.ids.argsort(stable=True)[bounds[0] :], bounds - bounds[0]

    def of_parts(self, part: Tensor, parts: int) -> SampleRows:
        """Return the rows as those of pairs of a sample and the part that each row meets (of none from `parts` on)."""
        nobody = (self.ids < 0) | (part >= parts)
        return SampleRows(self.dim, torch.where(nobody, -1, self.ids * parts + part), self.samples * parts)


#: From a node, the gradient that comes to it, its rows and the shapes of what is behind it: factors by child.
ClosedForm = Callable[[Any, Tensor, SampleRows, Mapping[int, tuple[int, ...]]], dict[int, Factor]]


def _outer(weight: int, x: Tensor | None, grad: Tensor, rows: SampleRows) -> dict[int, Factor]:
    if x is None or x.layout != torch.strided:
        return {}
    (tokens, offsets), (grads, _) = rows.split(x), rows.split(grad)
    if rows.dim == 0:  # x @ W
        return {weight: Outer(grads, tokens, offsets)}
    return {weight: Outer(tokens, grads, offsets)}  # W @ x


def _mm(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    weight = 1 - rows.dim
    if weight not in shapes:
        return {}
    return _outer(weight, saved(node, "self") if weight == 1 else saved(node, "mat2"), grad, rows)


def _addmm(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    if saved(node, "alpha") != 1 or saved(node, "beta") != 1:
        return {}
    weight, found = 2 - rows.dim, dict[int, Factor]()
    if weight in shapes:
        found = _outer(weight, saved(node, "mat1") if weight == 2 else saved(node, "mat2"), grad, rows)
    return found | (_sum(0, grad, None, rows, shapes[0]) if 0 in shapes else {})


def _sum(child: int, grad: Tensor, x: Tensor | None, rows: SampleRows, shape: tuple[int, ...]) -> dict[int, Factor]:
    """Return the sum over rows of grad, or of grad times x, where what is behind was broadcast to many rows."""
    features = math.prod(shape)
    over_rows = features * grad.shape[rows.dim] == grad.numel()
    last = bool(shape) and shape[-1] == features == grad.shape[-1] and rows.dim % grad.dim() != grad.dim() - 1
    if not (over_rows or last) or (x is not None and (x.shape != grad.shape or x.dtype != grad.dtype)):
        return {}

    def flat(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        split, offsets = rows.split(tensor)
        if offsets is None:
            return split.reshape(rows.samples, -1, features), None
        return split.reshape(-1, features), offsets * (math.prod(split.shape[1:]) // features)

    grads, offsets = flat(grad)
    return {child: RowSum(grads, None if x is None else flat(x)[0], offsets, torch.Size(shape))}


def _mul(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    found: dict[int, Factor] = {}
    for child, shape in shapes.items():
        x = saved(node, "other") if child == 0 else saved(node, "self")
        if isinstance(x, Tensor):
            found |= _sum(child, grad, x, rows, shape)
    return found


def _add(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    found: dict[int, Factor] = {}
    for child, shape in shapes.items():
        if child == 0 or saved(node, "alpha") == 1:
            found |= _sum(child, grad, None, rows, shape)
    return found


def _expand(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    return _sum(0, grad, None, rows, shapes[0]) if 0 in shapes else {}


def _layer_norm(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    if len(saved(node, "normalized_shape") or ()) != 1:
        return {}
    found: dict[int, Factor] = {}
    if 1 in shapes:
        x = (saved(node, "input") - saved(node, "result1")) * saved(node, "result2")
        found |= _sum(1, grad, x, rows, shapes[1])
    return found | (_sum(2, grad, None, rows, shapes[2]) if 2 in shapes else {})


def _grouped_mm(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    x, ends = saved(node, "self"), saved(node, "offs")
    if 1 not in shapes or rows.dim != 0 or ends is None or x is None or not x.dim() == grad.dim() == 2:
        return {}
    part = torch.bucketize(torch.arange(len(rows.ids), device="cpu"), ends.cpu(), right=True)
    pairs = rows.of_parts(part, len(ends))
    (tokens, offsets), (grads, _) = pairs.split(x), pairs.split(grad)
    return {1: Stacked(Outer(grads, tokens, offsets), len(ends))}


def _index(node: Any, grad: Tensor, rows: SampleRows, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Factor]:
    """Return the factor of a parameter whose rows the model takes by its own index: each token's expert's matrices."""
    index = [each for each in saved(node, "indices") if each is not None]
    if len(index) != 1 or index[0].dim() != 1 or index[0].dtype in (torch.bool, torch.uint8) or rows.dim != 0:
        return {}
    parts, shape = shapes[0][0], torch.Size(shapes[0][1:])
    if saved(node, "indices")[0] is None or grad.shape[1:] != shape:
        return {}
    grads, offsets = rows.of_parts(index[0].cpu() % parts, parts).split(grad)
    flat = grads.reshape(*grads.shape[: grads.dim() - len(shape)], math.prod(shape))
    return {0: Stacked(RowSum(flat, None, offsets, shape), parts)}


CLOSED_FORMS: dict[str, ClosedForm] = {
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "MulBackward0": _mul,
    "AddBackward0": _add,
    "ExpandBackward0": _expand,
    "NativeLayerNormBackward0": _layer_norm,
    "GroupedMmBackward0": _grouped_mm,
    "IndexBackward0": _index,
}

#: Nodes without the batch that change no gradient's norm on its way to the one node behind them.
_KEEP_NORMS = frozenset(
    {
        "TBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "UnsqueezeBackward0",
        "SqueezeBackward1",
        "CloneBackward0",
        "ToCopyBackward0",
    }
)


def keeps_norms(node: Any, shapes: tuple[tuple[int, ...], ...], behind: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether a node without the batch changes no gradient's norm on its way to what is behind it.

    Args:
        node: with one node behind it.
        shapes: of its outputs.
        behind: of those of the node behind it.
    """
    name = node.name()
    # What adds a constant (the 1 + w of some norms).
    shift = name == "AddBackward0" and saved(node, "alpha") == 1 and shapes == behind
    return shift or name in _KEEP_NORMS
