r"""The weighted pass: which sample each row of an activation's gradient belongs to, by backward passes of our own.

Where samples do not mix, row i of every gradient is linear in what enters at sample i's outputs, and in nothing else.
Powers of two scale floating-point numbers without rounding. So from outputs weighted by :math:`w_i = 2^{d(i)}`, d(i) a
digit of i to base 16, a row of sample i is bit for bit :math:`w_i` times what it is without weights, in every dtype and
under autocast. As many passes as i has digits spell every sample's number out; a row that is no such multiple has
parts of several samples. Which tensors are looked at is the caller's business: nothing here knows of layers.

Only gradients of activations are asked for, and none of parameters: nothing is accumulated, and what wrappers such as
DistributedDataParallel hang on parameters is not reached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lipcore.capture.foreign_functions import put_back
from lipcore.capture.seeds import Seeds
from lipcore.capture.training_pass import in_backward

#: In the place of a sample's number: the row had no gradient; parts of several samples, or of none; NaN or infinity.
NO_GRADIENT, MIXED, NOT_FINITE = -1, -2, -3
#: Bits of a digit, and those where float16 is computed with, whose range is small.
BITS, BITS_OF_FLOAT16 = 4, 2
#: Digits in sharded models, where every rank must run as many passes whatever its batch: numbers up to 4096.
FIXED_DIGITS = 3

#: A squared norm below which float32 has fewer digits (its smallest normal number is 1.2e-38), and shows nothing.
NOTHING = 1e-64

_under_way: set[int] = set()  # numbers of the backward passes that are proofs


class _Asking(threading.local):
    """The backward passes of this thread in which another one is asked for: that has no number before it begins."""

    within: tuple[int, ...] = ()


_asking = _Asking()


def is_proof() -> bool:
    """Return whether the backward pass under way is a proof's or a check's, of which hooks of lipcore's take no
    notice."""
    if not _under_way:
        return False
    task = in_backward()
    return task in _under_way or (bool(_asking.within) and task > _asking.within[-1])


@contextmanager
def own_backward(node: Any) -> Iterator[None]:
    """Make backward passes from this node that are asked for in the with block, be it within the backward pass under
    way, known as none of the training's."""
    before, mine = _asking.within, [-2]  # a number that no pass has: something is under way

    def begin(_: Any) -> None:
        if in_backward() > _asking.within[-1]:
            mine.append(in_backward())
            _under_way.add(in_backward())

    _under_way.update(mine)
    _asking.within = (*before, in_backward())
    handle = node.register_prehook(begin)
    try:
        yield
    finally:
        handle.remove()
        _asking.within = before
        _under_way.difference_update(mine)


@dataclass(eq=False)
class Point:
    """A place in the graph whose gradient's rows are asked about.

    Attributes:
        at: node of the graph at one of whose outputs the gradient is meant, or a leaf.
        squares: takes the gradient to the squared norm of every row, float64 [N].
        output: the number of the node's output.
    """

    at: Any
    squares: Callable[[Tensor], Tensor]
    output: int = 0
    found: Tensor | None = field(default=None, repr=False)


class RowIds(NamedTuple):
    """The sample that each row belongs to.

    Attributes:
        ids: int64 [N], or one of the negative numbers above.
        rounding: the largest error of a squared norm's ratio to a power of four; 0 where all rows are the same bits.
        squares: float64 [N], squared norms without weights.
    """

    ids: Tensor
    rounding: float
    squares: Tensor


def row_ids(
    seeds: Seeds,
    points: Sequence[Point],
    *,
    bits: int = BITS,
    digits: int = 0,
    tolerance: float = 2e-5,
    foreign: Sequence[Any] = (),
) -> list[RowIds | None]:
    """Find the samples of all points' rows.

    Args:
        seeds: the outputs that the backward passes begin at.
        points: what is looked at; all at nodes and leaves of the graph behind the seeds.
        bits: the bits of a digit.
        digits: how many; 0: as many as the number of samples has.
        tolerance: of the ratio of squared norms, relative, for operations that are not the same bits in every run.
        foreign: nodes of autograd Functions that may change what they keep.

    Returns:
        Per point its rows, or None where no gradient came to it.

    Raises:
        RuntimeError: the graph allows no backward pass.
    """
    numbers = torch.arange(seeds.size, device="cpu")
    base = 1 << bits
    used = digits or digits_of(seeds.size, bits)
    plain = squared_norms(seeds, points, torch.ones(seeds.size, device="cpu"), foreign)
    weighted = []
    for place in range(used):
        digit = (numbers >> (bits * place)) % base
        weights = torch.ldexp(torch.ones(seeds.size, device="cpu"), digit)
        weighted.append(squared_norms(seeds, points, weights, foreign))
    found: list[RowIds | None] = []
    for i, first in enumerate(plain):
        rows = [each[i] for each in weighted]
        known = [row for row in rows if row is not None]
        there = first is not None and len(known) == len(rows)
        found.append(spelled(first, known, bits, seeds.size, tolerance) if there and first is not None else None)
    return found


def squared_norms(
    seeds: Seeds, points: Sequence[Point], weights: Tensor, foreign: Sequence[Any] = ()
) -> list[Tensor | None]:
    """Run one backward pass; return per point the squared norms of its gradient's rows, float64 on the CPU.

    Gradients are reduced as they come, but for those that nothing further is asked behind: all gradients of a model at
    once, beside all its activations, would be the largest memory of the training.
    """
    if not points:
        return []
    lowest = _lowest(seeds.outputs, points)
    passing = [point for point in points if point not in lowest]
    for point in points:
        point.found = None
    handles = [
        point.at.register_prehook(lambda grads, point=point: _take(point, grads[point.output]))
        for point in passing
        if not isinstance(point.at, Tensor)
    ]
    wanted: list[Any] = [p.at if isinstance(p.at, Tensor) else GradientEdge(p.at, p.output) for p in lowest]
    try:
        with put_back(foreign), _counted(seeds.outputs), torch.autocast(seeds.outputs[0].device.type, enabled=False):
            gradients = torch.autograd.grad(
                seeds.outputs, wanted, seeds.gradients(weights), retain_graph=True, allow_unused=True
            )
            # Here, before a Function that returned what it keeps has that back.
            for point, gradient in zip(lowest, gradients, strict=True):
                _take(point, gradient)
    finally:
        for handle in handles:
            handle.remove()
    return [point.found if point.found is None else point.found.cpu() for point in points]


def _take(point: Point, gradient: Tensor | None) -> None:
    if gradient is not None:
        with torch.no_grad():
            point.found = point.squares(gradient.detach())


@contextmanager
def _counted(outputs: Sequence[Tensor]) -> Iterator[None]:
    """Make backward passes from these outputs known as a proof's within the with block."""
    mine: list[int] = []

    def begin(_: Any) -> None:
        mine.append(in_backward())
        _under_way.add(in_backward())

    handles = [output.register_hook(begin) for output in outputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _under_way.difference_update(mine)


def _lowest(outputs: Sequence[Tensor], points: Sequence[Point]) -> list[Point]:
    """Return the points with no other point behind them, towards the leaves."""
    mine = {point.at for point in points if not isinstance(point.at, Tensor)}
    above: dict[Any, bool] = {}  # whether one of them is behind this node
    todo = [(output.grad_fn, False) for output in outputs]
    while todo:
        node, looked = todo.pop()
        if node is None or (not looked and node in above):
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if looked:
            above[node] = any(child in mine or above.get(child, False) for child in children)
        else:
            above[node] = False
            todo.append((node, True))
            todo += [(child, False) for child in children]
    return [point for point in points if isinstance(point.at, Tensor) or not above.get(point.at, False)]


def digits_of(size: int, bits: int) -> int:
    """Return how many digits of so many bits spell the numbers below a size."""
    return max(1, -(-max(1, size - 1).bit_length() // bits))


def spelled(plain: Tensor, weighted: Sequence[Tensor], bits: int, size: int, tolerance: float) -> RowIds:
    """Return the numbers below `size` that squared norms of rows spell, from those of a pass without weights and of one
    for each digit."""
    ids, rounding = torch.zeros(len(plain), dtype=torch.int64, device="cpu"), 0.0
    finite, none = plain.isfinite(), plain < NOTHING
    fits = torch.ones_like(finite)
    for place, row in enumerate(weighted):
        finite &= row.isfinite()
        none &= row < NOTHING * 4.0 ** ((1 << bits) - 1)
        ratio = torch.where(plain > 0, row / plain, torch.nan)
        digit = (torch.log2(ratio) / 2).round()
        error = (ratio / torch.exp2(2 * digit) - 1).abs()
        fits &= (error <= tolerance) & (digit >= 0) & (digit < (1 << bits))
        ids += digit.nan_to_num(0.0, 0.0, 0.0).to(torch.int64) << (bits * place)
        seen = error[finite & fits]
        rounding = max(rounding, float(seen.max()) if len(seen) else 0.0)
    ids[~fits | (ids >= size)] = MIXED
    ids[none] = NO_GRADIENT
    ids[~finite] = NOT_FINITE
    return RowIds(ids, rounding, plain)
