"""Whether what a loss sums up are terms of single samples, by backward passes from there to the model's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lipcore.capture.foreign_functions import is_foreign, put_back
from lipcore.capture.once_only import why_once_only
from lipcore.capture.proof import (
    BITS,
    BITS_OF_FLOAT16,
    MIXED,
    digits_of,
    own_backward,
    spelled,
)
from lipcore.models.outputs import tensors_of
from lipcore.models.torch_internals import keeps_by_hooks, saved
from lipcore.per_sample.loss_nodes import Made, Summed, signed, unknown

_MARK = "lipcore: an output of the model"  # in the metadata of a node of the graph
_MOST = 4096  # nodes that are looked at between a loss and the model's outputs
_KINDS = 256  # of losses that are remembered
_TOLERANCE, _TOLERANCE_HALF = 2e-5, 2e-2  # of squared norms
#: What leaves the last dimension where it is, or works along it.
_KEEPS_LAST = ("View", "UnsafeView", "ReshapeAlias", "ToCopy", "Alias", "Clone", "Slice", "LogSoftmax")


class _Mark(NamedTuple):
    """An output of the model: the node that made it, which of its outputs it is, and its batch dimension."""

    node: Any
    place: int
    dim: int
    size: int

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, self.place)


class LossTerms:
    """Proofs that the terms of one metric's losses are those of single samples.

    From the terms, weighted by powers of two by the sample that they are taken for, backward passes go to the model's
    outputs: rows of the gradient there are of the samples that they spell (:mod:`lipcore.capture.proof`).

    Args:
        batch_dim: of the outputs.
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self._batch_dim = batch_dim
        self._shown: set[Any] = set()  # kinds of losses whose terms are single samples'

    def mark_outputs(self, output: Any, samples: int) -> None:
        """Note in the graph which tensors a model has returned for so many samples; of one sample there is nothing to
        prove."""
        for tensor in tensors_of(output) if samples > 1 else ():
            at = tensor.grad_fn
            if at is not None and tensor.dim() > self._batch_dim and tensor.shape[self._batch_dim] == samples:
                notes: Any = at.metadata
                notes.setdefault(_MARK, {})[tensor.output_nr] = (self._batch_dim, samples)

    def check(self, summed: Sequence[Summed], *, again: bool) -> None:
        """Look whether each element of what a loss sums up is of one sample, in losses of a new kind, and `again`;
        where the way to marked outputs allows it.

        Raises:
            ValueError: they are sums of several samples' terms, or nothing says which sample they are of.
        """
        kind = tuple((each.made.node.name(), each.dim, each.made.shape) for each in summed)
        if not again and kind in self._shown:
            return
        try:
            for each in summed:
                _check(each)
        except RuntimeError:  # told behind its backward pass, which has freed the graph: no other one goes through it
            return
        if len(self._shown) < _KINDS:
            self._shown.add(kind)


def _check(summed: Summed) -> None:
    way = _Way.to(summed.made)
    if way is None or any(_are_samples(way, summed, grouping) for grouping in _groupings(summed, way.size)):
        return
    if summed.dim is None and _rows_are_samples(way, summed.made):
        return
    over = "" if summed.dim is None else f", summed up over dimension {summed.dim},"
    what = f"elements of what it has made, of shape {list(summed.made.shape)},{over} are not of one sample each"
    raise unknown(summed.made.node, f"{what} ({way.size} samples)")


class _Way(NamedTuple):
    """The part of a graph between terms and the outputs of the model that they are made of.

    Attributes:
        marks: these outputs.
        foreign: nodes of autograd Functions of the user's.
        size: the number of samples.
        straight: the terms are single rows of the outputs for sure: nothing but views and a softmax lies between.
    """

    marks: list[_Mark]
    foreign: list[Any]
    size: int
    straight: bool

    @classmethod
    def to(cls, made: Made) -> _Way | None:
        """Find it; None where there is none, or where a node on it may be run once only."""
        marks: list[_Mark] = []
        foreign: list[Any] = []
        straight, seen, todo = True, {made}, [made]
        while todo:
            now = todo.pop()
            found = now.node.metadata.get(_MARK, {}).get(now.place)
            if found is not None:
                marks.append(_Mark(now.node, now.place, *found))
                continue
            if len(seen) > _MOST or keeps_by_hooks(now.node) or why_once_only(now.node):
                return None
            if is_foreign(now.node):
                foreign.append(now.node)
            origins = [origin for origin in now.origins if origin is not None]
            straight &= len(origins) == 1 and _keeps_last(now, origins[0])
            todo += [origin for origin in origins if origin not in seen]
            seen.update(origins)
        if len({mark.size for mark in marks}) != 1:
            return None
        return cls(marks, foreign, marks[0].size, straight and marks[0].dim == 0)


def _keeps_last(made: Made, origin: Made) -> bool:
    shape, before = made.shape, origin.shape
    same = len(shape) > 1 and len(before) > 1 and shape[-1] == before[-1]
    dim = signed(saved(made.node, "dim")) if made.kind in ("LogSoftmax", "Slice") else -1
    last = dim in (-1, len(shape) - 1)
    return made.kind in _KEEPS_LAST and same and (last or made.kind == "Slice")


# ---- terms whose sample is known by their place


def _groupings(summed: Summed, size: int) -> Iterator[Tensor]:
    """Yield the samples that terms may be of by their place, shaped so as to broadcast to them."""
    shape = summed.made.shape
    order = torch.arange(size, device="cpu")
    dims = range(len(shape)) if summed.dim is None else [summed.dim]
    for dim in dims:
        if shape[dim] == size:
            yield _along(order, dim, len(shape))
    for dim in dims[:1]:
        if shape[dim] > size and shape[dim] % size == 0:  # tokens of all samples in one dimension; or of all views
            yield _along(order.repeat_interleave(shape[dim] // size), dim, len(shape))
            yield _along(order.repeat(shape[dim] // size), dim, len(shape))


def _along(samples: Tensor, dim: int, dimensions: int) -> Tensor:
    return samples.reshape([-1 if d == dim else 1 for d in range(dimensions)])


def _are_samples(way: _Way, summed: Summed, samples: Tensor) -> bool:
    if way.straight and summed.dim is None:
        return True
    for mark, squares in zip(way.marks, _squares(way, summed.made, samples, way.size, by_sample=True), strict=True):
        if squares is None:
            continue
        ids = _spelled(squares, way, summed.made, way.size)
        if bool(((ids == MIXED) | ((ids >= 0) & (ids != torch.arange(mark.size, device="cpu")))).any()):
            return False
    return True


# ---- terms of a choice of rows


def _rows_are_samples(way: _Way, made: Made) -> bool:
    """Return whether every element of the outputs goes into one row of the terms, and no row is of several samples."""
    rows = made.shape[0] if made.shape else 1
    if way.straight:
        return True
    numbers = _along(torch.arange(rows, device="cpu"), 0, len(made.shape))
    of_row = torch.full((rows,), -1, dtype=torch.int64, device="cpu")
    for mark, squares in zip(way.marks, _squares(way, made, numbers, rows, by_sample=False), strict=True):
        if squares is None:
            continue
        ids = _spelled(squares, way, made, rows)
        if bool((ids == MIXED).any()):
            return False
        samples = torch.arange(mark.size, device="cpu").repeat_interleave(len(ids) // mark.size)
        samples, ids = samples[ids >= 0], ids[ids >= 0]
        found = of_row.scatter(0, ids, samples)
        if bool((found[ids] != samples).any()) or bool(((of_row >= 0) & (found != of_row)).any()):
            return False
        of_row = found
    return True


# ---- the passes


def _bits(way: _Way, made: Made) -> int:
    dtypes = {made.dtype, *(Made(mark.node, mark.place).dtype for mark in way.marks)}
    return BITS_OF_FLOAT16 if torch.float16 in dtypes else BITS


def _spelled(squares: list[Tensor], way: _Way, made: Made, size: int) -> Tensor:
    wide = made.dtype in (torch.float32, torch.float64)
    return spelled(squares[0], squares[1:], _bits(way, made), size, _TOLERANCE if wide else _TOLERANCE_HALF).ids


def _squares(way: _Way, made: Made, ids: Tensor, size: int, *, by_sample: bool) -> list[list[Tensor] | None]:
    """Return, by output, the squares of its gradient of passes without and with weights; None where none comes."""
    bits = _bits(way, made)
    weights = [torch.ones(ids.shape, device="cpu")]
    weights += [torch.exp2((ids >> (bits * d)) % (1 << bits)).float() for d in range(digits_of(size, bits))]
    found: list[list[Tensor] | None] = [[] for _ in way.marks]
    for weight in weights:
        for i, gradient in enumerate(_gradients(way, made, weight)):
            rows = found[i]
            if gradient is None or rows is None:
                found[i] = None
                continue
            rows.append(_rows(gradient, way.marks[i].dim, by_sample=by_sample))
    return found


def _rows(gradient: Tensor, dim: int, *, by_sample: bool) -> Tensor:
    """Return squared norms of a gradient: one per sample, or of every element of one sample after the other."""
    squares = gradient.detach().double().square().movedim(dim, 0)
    return (squares.flatten(1).sum(1) if by_sample and squares.dim() > 1 else squares.flatten()).cpu()


def _gradients(way: _Way, made: Made, weights: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients at the outputs of weighted random gradients at the terms, the same at every call."""
    noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    seed = (noise.to(made.dtype) * weights.to(made.dtype)).to(made.device)
    start = GradientEdge(made.node, made.place)
    with put_back(way.foreign), own_backward(made.node), torch.autocast(seed.device.type, enabled=False):
        return torch.autograd.grad(
            [start], [mark.edge for mark in way.marks], [seed], retain_graph=True, allow_unused=True
        )
