"""Which parameters of a model are measured from the graph, looked at once for every structure that the graph has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipcore.capture.graph.another_size import HOOKED, CannotRun
from lipcore.capture.graph.frontier import Frontier, GraphsDiffer, frontier_of, frontier_of_one
from lipcore.capture.graph.orders import Orders
from lipcore.capture.graph.other_graph import Call, OtherGraphs
from lipcore.capture.graph.replay import Replay, is_sum
from lipcore.capture.graph.replay_costs import ReplayCosts
from lipcore.capture.graph.structure import NOT_YET, Structure
from lipcore.capture.graph.walk import Signature, Walk
from lipcore.capture.output_places import places_of
from lipcore.capture.seeds import Begins
from lipcore.capture.zero_mixing import BY_ZERO
from lipcore.layers import Batch
from lipcore.models.containers import leaves_of

_MOST = 32  # structures that are kept: models that loop over a sequence have many
_MOST_MOVES = 24  # of one structure's frontier: past an expert's matrices, biases, gate and activation
_SPARE = 8  # structures whose rows are proved as they come; those of others when a proof is due
REFUSED = "the autograd graph cannot measure it: {1}; nor can a rule: {0}"
_LOOSE = (
    "the model chooses rows anew in every pass where parameters meet the batch, so that it is known of passes that are "
    "proved alone whose they are"
)


_UNTOLD = (
    "where parameters meet the batch it is flattened with another dimension, and nothing shows whether the rows of a "
    "sample stand together or the samples take turns: {0}; let the model return what has the batch, or name the module "
    "inside that does, output='<module>'"
)


_RETURNED = (
    "the model returns what it makes of it where samples cannot be told apart, and no sums and products are taken "
    "there; detach() what is returned, or return it expanded over the samples"
)


class Followed(NamedTuple):
    """Findings about a pass before its backward pass.

    Attributes:
        replay: takes the norms in; None where no parameter is measured.
        refused: why parameters cannot be measured.
        unproved: why it is not proved whose the rows are, or "".
    """

    replay: Replay | None
    refused: dict[str, str]
    unproved: str


class GraphWays:
    """The ways from the graph of one model's passes.

    Args:
        model: the module that is called.
        max_bytes: what the gradients of single samples of one parameter may take.
        max_flops: what the replays for one parameter may take in one pass; None: any number.
        prove: find out whose rows are whose, by backward passes.
        whole: as of :class:`Replay`.
        orders: of the model's samples.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_bytes: int,
        max_flops: int | None,
        prove: bool,
        whole: bool,
        orders: Orders | None = None,
    ) -> None:
        self._orders = orders or Orders()
        self._max_bytes, self._max_flops = max_bytes, max_flops
        self._others = OtherGraphs(model)
        self._prove, self._whole = prove, whole
        self._spare = _SPARE
        self._known: dict[tuple[tuple[int, ...], tuple[tuple[int, str], ...], Signature], Structure] = {}
        self.ways: dict[str, str] = {}  #: per parameter, how it is measured

    def begun(self) -> list[Any] | None:
        """Return the states of the generators of random numbers, of which a pass that begins now draws, where they are
        known."""
        return self._others.begun()

    def follow(
        self,
        output: Any,
        call: Call,
        batch: Batch,
        parameters: Mapping[str, nn.Parameter],
        counts: Callable[[], bool],
        fail: Callable[[Exception], None],
        *,
        begins: Begins | None = None,
        due: bool = False,
    ) -> Followed:
        """Put hooks on a pass's graph.

        Args:
            output: of the model in this pass.
            call: of the model in this pass.
            batch: the pass's samples.
            parameters: to be measured.
            counts: asked in every backward pass: whether it is to be recorded.
            fail: gets what would have been raised in a backward pass.
            begins: where proofs begin; None: at all that the model returns.
            due: whether a proof is due in this pass.
        """
        begins = begins or Begins(output, batch)
        if not batch.size:
            return Followed(None, {}, "")
        walk = Walk(output)
        names = {id(parameter): name for name, parameter in parameters.items()}
        leaves = [leaf for leaf in leaves_of(call[:2]) if isinstance(leaf, Tensor)]
        dims = int(batch.size == 1), *(leaf.dim() for leaf in leaves)
        vary = self._orders.vary
        key = (*dims, int(vary)), tuple(walk.parameters(names).items()), walk.signature()
        structure = self._known.get(key)
        if structure is not None and structure.index_kept_by_hooks(walk):  # asked before anything is read of the nodes
            return Followed(None, dict.fromkeys(parameters, HOOKED), "")
        try:
            if structure is None or not structure.fits(walk, batch.size):
                structure = self._look(walk, output, call, batch, names, begins, due=due)
            elif self._proves(structure, walk, batch, begins, due=due):
                structure.rows.prove(walk, structure.frontier, begins.seeds(structure.places))
                if structure.rows.moved:
                    structure = self._look(walk, output, call, batch, names, begins, due=True)
        except (CannotRun, GraphsDiffer) as error:
            return Followed(None, dict.fromkeys(parameters, str(error)), "")
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = structure
        return self._followed(structure, walk, begins, batch, counts, fail)

    def _followed(
        self,
        structure: Structure,
        walk: Walk,
        begins: Begins,
        batch: Batch,
        counts: Callable[[], bool],
        fail: Callable[[Exception], None],
    ) -> Followed:
        frontier, rows = structure.frontier, structure.rows
        whose = {p: rows.samples(p, n, batch.size) for p in frontier.nodes if (n := frontier.rows(p, walk))}
        unseen = {p: mask for p, w in whose.items() if (mask := rows.unseen(p, len(w), batch.size)) is not None}
        seeds = functools.partial(begins.seeds, structure.places) if self._prove else None
        hooked = structure.kept_by_hooks(walk)
        nearer, more = frontier, dict[int, Tensor]()
        if not hooked:
            nearer, more = structure.carried(walk, whose, unseen, seeds, whole=self._whole)
        refused = frontier.refused | structure.wrong(walk) | self._too_large(walk, nearer, batch.size) | hooked
        if self._whole:
            returned = {name: free & nearer.returned for name, free in nearer.behind.items()}
            refused |= {name: _RETURNED for name, places in returned.items() if places}
        measured = _without(nearer, refused)
        if self._max_flops is not None or not self.ways.keys() >= set(measured.leaves.values()):
            refused |= self._too_long(walk, measured, batch.size)
            measured = _without(nearer, refused)
        if not measured.leaves:
            return Followed(None, refused, "")
        untold = ""
        if self._prove and batch.size > 1 and rows.unproved:
            for place in frontier.nodes.keys() & whose.keys():
                if rows.untold(place, len(whose[place]), batch.size):
                    unseen[place], untold = torch.ones(len(whose[place]), dtype=torch.bool), rows.unproved
        replay = Replay(
            *(walk, measured, whose | more, batch.size, counts, fail, rows.unreached, unseen, self._whole),
            untold=untold and _UNTOLD.format(untold),
        )
        unknown = self._prove and batch.size > 1 and rows.open(walk, frontier, batch.size)
        unproved = rows.unproved or (NOT_YET if unknown else "")
        if rows.by_zero and not rows.proved_in(walk):
            unproved = unproved or BY_ZERO
        if frontier.loose and not rows.proved_in(walk):
            unproved = unproved or _LOOSE
        return Followed(replay, refused, unproved if self._prove and batch.size > 1 and frontier.nodes else "")

    def _look(
        self,
        walk: Walk,
        output: Any,
        call: Call,
        batch: Batch,
        names: Mapping[int, str],
        begins: Begins,
        *,
        due: bool,
    ) -> Structure:
        """Find a structure's frontier and prove its rows; the frontier is moved towards the output past the nodes whose
        rows turn out to be in an order of the model's own."""
        if batch.offsets is not None:
            raise CannotRun("the samples are packed sequences, and the graph shows no rows of documents")
        other, returned = self._others.beside(walk, names, call, batch)
        if batch.size == 1:
            return Structure(frontier_of_one(walk, names))
        absorbed: set[int] = set()
        for _ in range(_MOST_MOVES):
            structure = Structure(frontier_of(walk, other, names, batch.size, absorbed, joining=self._orders.vary))
            structure.places = places_of(output, returned, batch)
            if not self._proves(structure, walk, batch, begins, due=due):
                break
            structure.rows.prove(walk, structure.frontier, begins.seeds(structure.places))
            if not structure.rows.moved:
                break
            absorbed |= structure.rows.moved
            due = True
        return structure

    def _proves(self, structure: Structure, walk: Walk, batch: Batch, begins: Begins, *, due: bool) -> bool:
        """Return whether a structure's rows are to be proved in this pass."""
        if not self._prove or batch.size == 1 or not structure.frontier.nodes or begins.output is None:
            return False
        rows = structure.rows
        unknown = bool(rows.unproved) or rows.not_finite or rows.open(walk, structure.frontier, batch.size, silent=True)
        if not due and unknown and self._spare > 0:
            self._spare -= 1
            return True
        return due

    def _too_large(self, walk: Walk, frontier: Frontier, samples: int) -> dict[str, str]:
        found = {}
        elements = {place: sum(map(math.prod, walk.shapes(place))) for place in frontier.free}
        for leaf, name in frontier.leaves.items():
            if self._whole and walk.nodes[leaf].variable.is_complex():
                found[name] = "it is complex, and sums and products of samples' gradients are for real numbers"
            element = walk.nodes[leaf].variable.element_size()
            held = samples * element * max(elements[place] for place in frontier.behind[name])
            if held > self._max_bytes:
                found[name] = (
                    f"the gradients of {samples} samples take {held:,} bytes, more than max_replay_bytes="
                    f"{self._max_bytes:,}; raise that, or register a rule for its layer"
                )
        return found

    def _too_long(self, walk: Walk, frontier: Frontier, samples: int) -> dict[str, str]:
        """Return the parameters whose replays take more than they may; note the ways of all."""
        costs, found = ReplayCosts(walk, frontier, samples, self._whole), {}
        for name in frontier.leaves.values():
            flops = costs.flops(name)
            if self._max_flops is not None and flops > self._max_flops:
                found[name] = (
                    f"the replays of {samples} samples take {flops:,} FLOPs, more than max_replay_flops="
                    f"{self._max_flops:,}; raise that, or register a rule for its layer"
                )
            elif name not in self.ways:
                self.ways[name] = _way(name, walk, frontier, samples, costs)
        return found


def _way(name: str, walk: Walk, frontier: Frontier, samples: int, costs: ReplayCosts) -> str:
    met = frontier.met(name, walk)
    kinds = sorted({walk.nodes[p].name() for p in met})
    if all(map(is_sum, kinds)):
        way = "sums over rows"
    else:
        way = "products of rows" if met.isdisjoint(costs.replays(name)) else f"{samples} replays"
    said = ", ".join(kind.removesuffix("0").removesuffix("Backward") for kind in kinds)
    flops = costs.flops(name)
    return f"{way} at {said}" + (f" ({flops:,} FLOPs in replays of the first pass)" if flops else "")


def _without(frontier: Frontier, refused: Container[str]) -> Frontier:
    """Return a frontier without the parameters that are refused. Nothing behind them is run: their leaves would
    accumulate once more."""
    leaves = {place: name for place, name in frontier.leaves.items() if name not in refused}
    free = frozenset[int]().union(*(frontier.behind[name] for name in leaves.values()))
    return replace(frontier, leaves=leaves, free=free)
