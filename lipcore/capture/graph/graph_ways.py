"""Which parameters of a model are measured from the graph, looked at once for every structure that the graph has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lipcore.capture.graph.another_size import CannotRun, on_one_more
from lipcore.capture.graph.frontier import Frontier, GraphsDiffer, Signature, Walk, frontier_of, frontier_of_one
from lipcore.capture.graph.replay import Replay, is_sum
from lipcore.capture.graph.rows import proved_rows, rows_by_shape
from lipcore.capture.seeds import seeds_of
from lipcore.layers import Batch

_MOST = 32  # structures that are kept: models whose input has ever other lengths have many
REFUSED = "it has no rule and cannot be measured from the autograd graph either: "


class GraphWays:
    """The ways from the graph of one model's passes.

    Args:
        model: the module that is called.
        max_bytes: what the gradients of single samples of one parameter may take.
        prove: find out whose rows are whose, by backward passes.
        whole: as of :class:`Replay`.
    """

    def __init__(self, model: nn.Module, *, max_bytes: int, prove: bool, whole: bool) -> None:
        self._model, self._max_bytes, self._prove, self._whole = model, max_bytes, prove, whole
        self._known: dict[tuple[int, Signature], tuple[Frontier, dict[int, Tensor]]] = {}
        self.ways: dict[str, str] = {}  #: per parameter, how it is measured

    def follow(
        self,
        output: Any,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        batch: Batch,
        parameters: Mapping[str, nn.Parameter],
        counts: Callable[[], bool],
        fail: Callable[[Exception], None],
    ) -> tuple[Replay | None, dict[str, str]]:
        """Put hooks on a pass's graph; return what takes the norms in, and why parameters cannot be measured."""
        walk = Walk(output)
        names = {id(parameter): name for name, parameter in parameters.items()}
        key = batch.size, (*walk.signature(), ("", (), tuple(walk.parameters(names))))
        if key not in self._known:
            try:
                found = self._look(walk, output, call, batch, names)
            except (CannotRun, GraphsDiffer) as error:
                return None, dict.fromkeys(parameters, f"{REFUSED}{error}")
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = found
        frontier, whose = self._known[key]
        refused = {name: REFUSED + why for name, why in frontier.refused.items()}
        if not frontier.leaves:
            return None, refused
        return Replay(walk, frontier, whose, batch.size, counts, fail, self._whole), refused

    def _look(
        self, walk: Walk, output: Any, call: tuple[Any, dict[str, Any]], batch: Batch, names: Mapping[int, str]
    ) -> tuple[Frontier, dict[int, Tensor]]:
        if batch.offsets is not None:
            raise CannotRun("the samples are packed sequences, and the graph shows no rows of documents")
        other = Walk(on_one_more(self._model, *call, batch.size, batch.dim))
        alone = batch.size == 1
        frontier = frontier_of_one(walk, names) if alone else frontier_of(walk, other, names, batch.size)
        whose = rows_by_shape(frontier, batch.size)
        wrong: dict[int, str] = {}
        seeds = seeds_of(output, batch)
        if self._prove and batch.size > 1 and seeds.outputs and frontier.nodes:
            try:
                whose, wrong = proved_rows(walk, frontier, seeds)
            except RuntimeError as error:
                raise CannotRun(f"its graph allows no other backward pass ({str(error)[:200]})") from error
        refused = dict(frontier.refused)
        for leaf, name in frontier.leaves.items():
            met = _met(walk, frontier, leaf)
            why = next((wrong[p] for p in met if p in wrong), "")
            held = batch.size * _bytes(walk.nodes[leaf].variable)
            if held > self._max_bytes:
                why = why or (
                    f"the gradients of {batch.size} samples take {held:,} bytes, more than max_replay_bytes="
                    f"{self._max_bytes:,}; raise that, or register a rule for its layer"
                )
            if why:
                refused[name] = why
            kinds = sorted({walk.nodes[p].name() for p in met})
            sums = all(map(is_sum, kinds))
            said = ", ".join(kind.removesuffix("0").removesuffix("Backward") for kind in kinds)
            self.ways[name] = f"graph: {'sums over rows' if sums else f'{batch.size} replays'} at {said}"
        leaves = {place: name for place, name in frontier.leaves.items() if name not in refused}
        return Frontier(leaves, frontier.free, frontier.nodes, refused), whose


def _met(walk: Walk, frontier: Frontier, leaf: int) -> set[int]:
    """Return the frontier nodes of one parameter."""
    mine, before = {leaf}, 0
    while len(mine) > before:
        before = len(mine)
        mine |= {place for place in frontier.free if not mine.isdisjoint(walk.next[place])}
    return {place for place in frontier.nodes if not mine.isdisjoint(walk.next[place])}


def _bytes(parameter: Tensor) -> int:
    return math.prod(parameter.shape) * parameter.element_size()
