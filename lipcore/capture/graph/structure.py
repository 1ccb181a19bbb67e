"""One structure that a model's graphs have, with what is known of it from earlier passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lipcore.capture.graph.another_size import HOOKED
from lipcore.capture.graph.carried import Carried, carried
from lipcore.capture.graph.frontier import Frontier
from lipcore.capture.graph.kept_tensors import is_once_only
from lipcore.capture.graph.replay_costs import ReplayCosts
from lipcore.capture.graph.rows import RowOrders
from lipcore.capture.graph.walk import Walk
from lipcore.capture.output_places import OutputPlaces
from lipcore.capture.seeds import Seeds

_WORTH = 2  # to follow rows costs about as much as to run a node for a few samples
NOT_YET = "no pass whose graph has this structure was proved yet"


@dataclass
class Structure:
    """The frontier of a structure, and whose the rows there are.

    Attributes:
        frontier: where rows are in the order of the batch.
        rows: what proofs have found there.
        carries: samples may be carried from there on; not once a proof has found others, nor where nearly all that
            is behind is to be replayed even so. None: not known yet.
        confirmed: places to which they were carried in a pass that was proved.
        places: where the samples are in what the model returns; None: where its shapes say it.
    """

    frontier: Frontier
    rows: RowOrders = field(default_factory=lambda: RowOrders(unproved=NOT_YET))
    carries: bool | None = None
    confirmed: set[int] = field(default_factory=set)
    places: OutputPlaces | None = None

    def __post_init__(self) -> None:
        self.rows.views = self.frontier.turns

    def index_kept_by_hooks(self, walk: Walk) -> bool:
        """Return whether hooks are on an index that is read in every pass."""
        return any(is_once_only(walk.nodes[place]) for place in self.frontier.indexed)

    def kept_by_hooks(self, walk: Walk) -> dict[str, str]:
        """Return the parameters for which a node would be read or run again on whose tensors hooks are."""
        frontier = self.frontier
        hooked = {p for p in (*frontier.nodes, *frontier.free) if is_once_only(walk.nodes[p])}
        if not hooked:
            return {}
        behind = frontier.behind.items()
        return {name: HOOKED for name, free in behind if not hooked.isdisjoint(free | frontier.met(name, walk))}

    def fits(self, walk: Walk, samples: int) -> bool:
        """Return whether every sample has as many rows at every frontier node."""
        each = all(self.frontier.rows(place, walk) % samples == 0 for place in self.frontier.nodes)
        return each and self.frontier.samples_kept(walk, samples)

    def wrong(self, walk: Walk) -> dict[str, str]:
        """Return the parameters that meet rows which are no single samples', and why."""
        wrong, frontier = self.rows.wrong, self.frontier
        if not wrong:
            return {}
        found = {n: [wrong[p] for p in frontier.met(n, walk) if p in wrong] for n in frontier.behind}
        return {name: why[0] for name, why in found.items() if why}

    def carried(
        self,
        walk: Walk,
        whose: Mapping[int, Tensor],
        unseen: Mapping[int, Tensor],
        seeds: Callable[[], Seeds] | None,
        *,
        whole: bool,
    ) -> Carried:
        """Return the frontier of a pass on whose tensors are no hooks, nearer to the parameters where the model chooses
        rows.

        Args:
            walk: the graph of the pass.
            whose: the samples of the rows at the frontier.
            unseen: places there with rows that no proof has seen.
            seeds: make what proofs begin with; None where passes are not to be proved.
            whole: as of :class:`Replay`.
        """
        if not self.frontier.moved or self.carries is False:
            return Carried(self.frontier, {})
        known = [p for p in self.frontier.nodes if p not in unseen and p not in self.rows.unreached]
        proves = seeds is not None and self.rows.proved_in(walk)
        free = seeds is None or proves
        found = carried(walk, self.frontier, whose, known, lambda place: free or place in self.confirmed)
        if self.carries is None and free:
            before, after = (len(ReplayCosts(walk, f, 1, whole)) for f in (self.frontier, found.frontier))
            self.carries = _WORTH * after <= before
            if not self.carries:
                return Carried(self.frontier, {})
        if proves and seeds is not None and found.whose:
            confirmed = self.rows.confirmed(walk, *found, seeds())
            if confirmed is None:
                self.carries = False
                return Carried(self.frontier, {})
            self.confirmed |= confirmed
        return found
