"""What passes have done that were proved: graph nodes, calls of layers, orders of the samples."""

from __future__ import annotations

from typing import Any

from lipcore.capture.graph.orders import OTHER, OTHER_REGIONS, WRITES, Orders, order_of
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.proof_schedule import ProofSchedule
from lipcore.capture.zero_mixing import BY_ZERO
from lipcore.models.outputs import nodes_of


class ProvedOperations:
    """The operations of one model's proved passes, which tell whether another one does something else.

    Args:
        orders: of the samples, in passes that were proved.
        schedule: is asked for another proof where something is new.
        sharded: parameters of the model are spread over ranks.
    """

    def __init__(self, orders: Orders, schedule: ProofSchedule, *, sharded: bool) -> None:
        self._orders, self._schedule, self._sharded = orders, schedule, sharded
        # By shape of the input: nodes, and calls of tapped layers; apart where another metric has begun gradients,
        # which add to the nodes.
        self._known: dict[tuple[int, ...], dict[int, set[tuple[int, int]]]] = {}

    def is_unknown(self, run: LayerPass) -> bool:
        """Return whether a pass of one sample does what those before did not whose input had its shape: its sums show
        all that is to be shown."""
        done, known = (run.nodes, run.taps), self._known.get(run.shape, {}).get(run.begun)
        return run.batch.size == 1 and known is not None and done not in known

    def other(self, run: LayerPass, output: Any, *, proved: bool, compiled: bool, by_zero: bool) -> str:
        """Return what a pass may do that none has done which was proved, or "" where there is nothing.

        Args:
            proved: it is proved itself.
            by_zero: factors of 0 mixed the samples of passes of its kind.
        """
        if run.kind is None:
            return ""
        orders, samples = self._orders, run.batch.size
        if proved:
            orders.look(output, samples)
        run.order = order_of(output, samples) if orders.chosen else None
        if proved:
            return ""
        done, known = (run.nodes, run.taps), self._known.get(run.shape)
        if known is not None and run.begun not in known:
            self._schedule.ask_soon(run.kind)
        # A proof that was asked for has no other metric's gradients, and brings no other one of a sharded model.
        others = set[tuple[int, int]]().union(*known.values()) if known and self._sharded else {done}
        if known is not None and done not in known.get(run.begun, others):
            return OTHER_REGIONS if compiled else OTHER
        if run.order is not None:
            news = orders.news((*run.kind, run.begun), run.order, shape_is_known=known is not None)
            if news:
                return news
        if by_zero:
            return BY_ZERO
        return WRITES if orders.writes else ""

    def note(self, run: LayerPass) -> None:
        """Note how many graph nodes the forward pass of a proved pass has made, the sums of whose samples' gradients
        were right too, how many calls of layers it had, and the order of its samples. A pass whose input has the same
        shape and that has other numbers does something else."""
        if not run.proved and run.batch.size > 1:
            return
        self._known.setdefault(run.shape, {}).setdefault(run.begun, set()).add((run.nodes, run.taps))
        if run.order is not None and run.kind is not None:
            self._orders.add((*run.kind, run.begun), run.order)


def kinds_of_nodes(output: Any) -> int:
    """Return a number that is the same for two passes of a compiled model that ran the same compiled regions: each has
    a type of nodes of its own."""
    return abs(hash(tuple([type(node) for node in nodes_of(output)])))
