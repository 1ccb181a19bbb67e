"""The per-sample gradients of one backward pass at the frontier, and their way through the graph without the batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.gradient_sums import GradientSums
from lipcore.capture.graph.closed_forms import CLOSED_FORMS, SampleRows
from lipcore.capture.graph.edges import Edges
from lipcore.capture.graph.frontier import EVERYTHING, Frontier
from lipcore.capture.graph.gradient_rows import only_rows, sums_of_samples, touches, with_rows
from lipcore.capture.graph.kept_tensors import reading
from lipcore.capture.graph.returned import ReturnedPlaces
from lipcore.capture.graph.rows import as_real
from lipcore.capture.graph.walk import Walk
from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import in_backward
from lipcore.layers import Dense, Factor, norms_sq_of
from lipcore.models.torch_internals import current_node

#: Nodes whose own backward gives, from the whole gradient, a product per element: its sums over rows are the samples'.
ELEMENTWISE = frozenset({"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"})
EXPAND = "ExpandBackward0"
_UNREACHED = (
    "the model's outputs bring no gradient to a place where parameters without a rule meet the batch (a loss of its "
    "own inside the model), so that it is not proved whose rows it has there"
)
NOT_FINITE_ROWS = (
    "no sample has a finite norm here: the node that is run again for each of them keeps all samples' rows, and some "
    "of these (a sample's input or activation) are NaN or infinite; leave such samples out of the batch"
)
UNSEEN_ROWS = (
    "in every proof so far some rows had no gradient where parameters meet the batch, so that it is not known whose "
    "they are; the norms of passes in which they have one are NaN until a proof has seen it"
)


def is_sum(name: str) -> bool:
    """Return whether a frontier node of this name is measured by sums over rows, and not by a replay per sample."""
    return name in ELEMENTWISE or name == EXPAND


class Replay:
    """The hooks on one pass's graph that bring the norms of parameters without a rule.

    A frontier node is run again before the engine frees what it keeps, and so is every node behind it. Functions that
    the hooks call must raise nothing: errors go to `fail`.

    Args:
        walk: the graph of the pass.
        frontier: what is measured in it.
        whose: per frontier node, the samples of its rows.
        samples: B.
        counts: asked in every backward pass: whether it is to be recorded.
        fail: gets what would have been raised.
        unreached: frontier nodes of whose rows no proof knows, since no gradient comes to them from the outputs.
        unseen: per frontier node, rows that had no gradient in any proof, and whose norms are NaN when they have.
        whole: keep the gradients of single samples until they are asked for, not only their squares.
        untold: why rows are among `unseen` of which nothing says whose they are.

    Attributes:
        unproved: why it is not proved whose rows came in the last backward pass, or "".
        sums: gets what the samples' gradients add up to, where it is there.
    """

    def __init__(
        self,
        walk: Walk,
        frontier: Frontier,
        whose: Mapping[int, Tensor],
        samples: int,
        counts: Callable[[], bool],
        fail: Callable[[Exception], None],
        unreached: Container[int] = (),
        unseen: Mapping[int, Tensor] | None = None,
        whole: bool = False,
        *,
        untold: str = "",
    ) -> None:
        self.whole = whole
        self._why_unseen = untold or UNSEEN_ROWS
        self._leaves, self._samples = frontier.leaves, samples
        self._counts, self._fail, self._unreached, self._unseen = counts, fail, unreached, unseen or {}
        self._behind_leaf = {name: frontier.behind[name] for name in frontier.leaves.values()}
        self._returned = ReturnedPlaces(frontier.returned, self._behind_leaf, samples)
        self._unknown, self._looped = False, set[int]()  # places behind frontier nodes that were run for every sample
        self.unproved = ""
        self.sums: GradientSums | None = None
        self._edges = Edges(walk, frontier)
        self._sums: dict[int, dict[int, Tensor]] = {}  # per free node and output, [B, *shape]
        self._totals: dict[int, Tensor] = {}  # at free nodes, sums over the samples of what has a closed form
        self._task = -1
        self._squares: dict[str, Tensor] = {}
        self._factors: dict[str, Factor] = {}  # in place of squares, where gradients are kept whole
        for place, at in frontier.nodes.items():
            walk.nodes[place].register_prehook(_Hook(self._frontier, place, at, whose.get(place)))
        for place in frontier.free:
            if not hasattr(walk.nodes[place], "variable"):  # a leaf would accumulate
                walk.nodes[place].register_prehook(_Hook(self._free, place))

    def _begin(self) -> bool:
        if is_proof() or not self._counts():
            return False
        if self._task != in_backward():
            self._task = in_backward()
            self._sums, self._squares, self._factors, self.unproved, self._unknown = {}, {}, {}, "", False
            self._looped, self._totals = set(), {}
            self._returned.begin()
            if self.sums is not None:
                self.sums.begin(self._task)
        return True

    def _frontier(
        self,
        grads: tuple[Tensor | None, ...],
        node: Any,
        place: int,
        at: tuple[int | None, ...],
        whose: Tensor | None,
    ) -> None:
        if whose is None or all(grad is None for grad in grads) or not self._begin():
            return
        if self.sums is not None:
            self.sums.look_at(grads)
        if place in self._unreached:
            self.unproved = _UNREACHED
        if any(g is not None and each is None for g, each in zip(grads, at, strict=True)):
            raise RuntimeError("an output without the batch got a gradient, whose samples cannot be told apart")
        if place in self._unseen:
            self._look_at_unseen(grads, at, self._unseen[place])
        done = self._closed_form(node, grads, place, at, whose)
        if all(child not in self._edges.shapes for i, child in enumerate(self._edges.next[place]) if i not in done):
            return
        name = node.name()
        if is_sum(name) and at[0] is not None and grads[0] is not None:
            grad = grads[0]
            found = (grad,) if name == EXPAND else _run(node, (grad,))
            owners = whose.to(grad.device)
            for i, (child, number, out) in enumerate(self._behind(place, found)):
                if out is not None and child in self._edges.shapes and i not in done:
                    shape = self._edges.shapes[child][number]
                    self._add(child, number, sums_of_samples(out, at[0], owners, self._samples, shape))
            return
        self._looped |= {c for i, c in enumerate(self._edges.next[place]) if i not in done}
        rows: dict[tuple[int, int], list[Tensor]] = {}
        for sample in range(self._samples):
            masked = tuple(
                g if g is None or each is None else only_rows(g, each, whose == sample)
                for g, each in zip(grads, at, strict=True)
            )
            self._collect(rows, place, _run(node, masked), done)
        self._add_all(rows)

    def _look_at_unseen(self, grads: tuple[Tensor | None, ...], at: tuple[int | None, ...], rows: Tensor) -> None:
        """Note rows with a gradient that no proof has seen. Where it is not finite, it makes the norm of the sample
        that they are taken for NaN by itself."""
        for grad, dim in with_rows(grads, at):
            touched, finite = touches(grad, dim, rows)
            if finite:
                self._unknown, self.unproved = True, self._why_unseen
            elif touched:
                self.unproved = self.unproved or self._why_unseen

    def _behind(self, place: int, found: tuple[Tensor | None, ...]) -> Iterator[tuple[int, int, Tensor | None]]:
        return zip(self._edges.next[place], self._edges.numbers[place], found, strict=True)

    def _closed_form(
        self, node: Any, grads: tuple[Tensor | None, ...], place: int, at: tuple[int | None, ...], whose: Tensor
    ) -> Container[int]:
        """Take in what a closed form knows of; return the numbers of those of the node's children."""
        form = CLOSED_FORMS.get(node.name())
        shapes = self._edges.direct_shapes(place)
        first = grads[0]
        if form is None or not shapes or first is None or first.is_complex() or at[0] is None or at[0] == EVERYTHING:
            return ()
        factors = form(node, first, SampleRows(at[0], whose, self._samples), shapes)
        if self.whole:  # in the shape of the parameter: not behind a transposition
            factors = {i: factor for i, factor in factors.items() if self._edges.next[place][i] in self._leaves}
        named = {self._edges.direct[self._edges.next[place][i]]: factor for i, factor in factors.items()}
        if self.whole:
            self._factors |= named
        else:
            if self.sums is not None:
                self._add_up(self.sums, place, factors)
            for name, row in norms_sq_of(named).items():
                self._add_squares(name, row)
        return factors

    def _add_up(self, sums: GradientSums, place: int, factors: Mapping[int, Factor]) -> None:
        """Take in the sums of the samples' gradients at a node's children; they go on from there as gradients do."""
        for i, factor in factors.items():
            child = self._edges.next[place][i]
            if child in self._leaves:
                sums.add_factors({self._leaves[child]: factor})
            else:
                with torch.autocast(next(factor.tensors()).device.type, enabled=False):
                    self._totals[child] = factor.weighted_sum(torch.ones(factor.samples, dtype=torch.float64))

    def _pass_on(self, sums: GradientSums, place: int, node: Any, total: Tensor) -> None:
        """Take a sum of the samples' gradients at a node to what is behind it."""
        for child, number, out in self._behind(place, _run(node, (total.to(node._input_metadata[0].dtype),))):
            if out is not None and child in self._leaves:
                sums.add(self._leaves[child], out)
            elif out is not None and child in self._edges.shapes:
                self._totals[child] = out.sum_to_size(self._edges.shapes[child][number])

    def _free(self, grads: tuple[Tensor | None, ...], node: Any, place: int) -> None:
        if place in self._returned and any(grad is not None for grad in grads) and not self._begin():
            return
        if self._task != in_backward():
            return
        sums = self._sums.pop(place, {})
        if place in self._returned:
            self._returned.compare(grads, sums, place)
        total = self._totals.pop(place, None)
        if total is not None and self.sums is not None:
            self._pass_on(self.sums, place, node, total)
        rows: dict[tuple[int, int], list[Tensor]] = {}
        for sample in range(self._samples if sums else 0):
            # Sums of half precision are float32; a node takes the dtype of its outputs, as from the engine.
            mine = tuple(
                sums[k][sample].to(data.dtype) if k in sums else None for k, data in enumerate(node._input_metadata)
            )
            self._collect(rows, place, _run(node, mine))
        self._add_all(rows)

    def outside(self) -> dict[str, str]:
        """Return the parameters of which the last backward pass brought more than samples' gradients, and why."""
        return self._returned.outside()

    def _collect(
        self,
        rows: dict[tuple[int, int], list[Tensor]],
        place: int,
        found: tuple[Tensor | None, ...],
        done: Container[int] = (),
    ) -> None:
        here: dict[tuple[int, int], Tensor] = {}
        for i, (child, number, out) in enumerate(self._behind(place, found)):
            if out is None or child not in self._edges.shapes or i in done:
                continue
            out = out.to_dense() if out.layout != torch.strided else out
            out = out.sum_to_size(self._edges.shapes[child][number])  # as the engine does between nodes
            key = child, number
            here[key] = here[key] + out if key in here else out
        for key, out in here.items():
            if self._only_squares(key[0]):  # its only use: no gradient needs to be kept
                if self.sums is not None:
                    self.sums.add(self._leaves[key[0]], out)
                out = as_real(out).double().square().sum()
            rows.setdefault(key, []).append(out)

    def _add_all(self, rows: dict[tuple[int, int], list[Tensor]]) -> None:
        for (child, number), each in rows.items():
            stacked = torch.stack(each)
            if self._only_squares(child):
                self._squares[self._leaves[child]] = stacked
            else:
                self._add(child, number, stacked)

    def _add_squares(self, name: str, row: Tensor) -> None:
        """Take in squared norms, of all of a parameter or of a part that nothing else comes to."""
        self._squares[name] = self._squares[name] + row if name in self._squares else row

    def _only_squares(self, place: int) -> bool:
        return not self.whole and place in self._leaves and self._edges.uses[place] == 1

    def _add(self, child: int, number: int, rows: Tensor) -> None:
        sums = self._sums.setdefault(child, {})
        sums[number] = sums[number] + rows if number in sums else rows

    def norms_sq(self, task: int) -> dict[str, Tensor]:
        """Return the squared norms that a backward pass has brought, float64 [B] each; to be asked once."""
        if task != self._task:
            return {}
        found = dict(self._squares)
        for place, name in self._leaves.items():
            if place in self._sums:
                if self.sums is not None:
                    self.sums.add(name, self._sums[place][0].sum(0))
                rows = as_real(self._sums[place][0]).double().reshape(self._samples, -1)
                square = rows.square().sum(1)
                found[name] = found[name] + square if name in found else square  # of the other parts
        self._sums, self._squares, self._task = {}, {}, -1
        return {name: torch.full_like(row, torch.nan) for name, row in found.items()} if self._unknown else found

    def hidden(self, rows: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the parameters of which samples have no norm because of other samples' rows, and why.

        Args:
            rows: the numbers per parameter that the last backward pass brought, [B] or [K, B].
        """
        mine = {name: rows[name] for name in self._behind_leaf if name in rows}
        if self._unknown:
            return dict.fromkeys(mine, self._why_unseen)
        if self._samples < 2 or not self._looped:
            return {}
        run = [name for name in mine if not self._looped.isdisjoint(self._behind_leaf[name])]
        if not run:
            return {}
        # One question to a device.
        finite = torch.stack([mine[name].isfinite().any() for name in run]).tolist()
        return {name: NOT_FINITE_ROWS for name, any_finite in zip(run, finite, strict=True) if not any_finite}

    def factors(self, task: int) -> dict[str, Factor]:
        """Return the gradients of single samples that a backward pass has brought; to be asked once, where they are
        kept whole."""
        if task != self._task:
            return {}
        places = [(place, name) for place, name in self._leaves.items() if place in self._sums]
        found = self._factors | {name: Dense(self._sums[place][0]) for place, name in places}
        if self._unknown:
            found = {name: Dense(torch.full_like(self._dense(factor), torch.nan)) for name, factor in found.items()}
        self._sums, self._factors, self._task = {}, {}, -1
        return found

    def _dense(self, factor: Factor) -> Tensor:
        return torch.stack([factor.dense(sample) for sample in range(self._samples)])

    def guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call one of the hooks' functions; hand on what it raises."""
        try:
            with torch.no_grad(), reading():
                call(*arguments)
        except Exception as error:
            self._fail(ValueError(f"model: parameters {self._names()} could not be measured from the graph: {error}"))

    def _names(self) -> str:
        names = list(self._leaves.values())
        return ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)


class _Hook:
    """The hook before a node, which it does not keep: each would keep the other alive for ever."""

    def __init__(self, call: Callable[..., None], *rest: Any) -> None:
        self._call, self._rest = call, rest

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        replay: Replay = self._call.__self__  # type: ignore[attr-defined]
        replay.guarded(self._call, grads, current_node(), *self._rest)


def _run(node: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    found = node(*grads)
    return found if isinstance(found, tuple) else (found,)
