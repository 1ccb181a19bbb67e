"""The parameters that no layer's rule brings: hooks on each pass's graph, and what sees into checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from lipcore.capture.graph.another_size import HOOKED
from lipcore.capture.graph.frontier import FUSED
from lipcore.capture.graph.graph_ways import REFUSED, GraphWays
from lipcore.capture.graph.kept_tensors import reading
from lipcore.capture.graph.own_graph import OwnGraph
from lipcore.capture.layers.audit import Audit, uses_of
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.keepers import Keepers
from lipcore.capture.layers.layer_pass import LayerPass
from lipcore.capture.layers.layer_site import ROOT, LayerSite
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.passes import Passes
from lipcore.capture.layers.proofs import Proofs
from lipcore.capture.seeds import Begins
from lipcore.capture.zero_mixing import BY_ZERO
from lipcore.layers.factor_estimate import Signs

LATER = (
    "parameter '{0}' is used inside an activation checkpoint, outside of its own module; the next passes keep what is "
    "needed there"
)
FUSED_THEN = (
    "parameter '{0}' is used by others than its own layer, which is fused; in the next passes that layer is not, and "
    "the graph measures it"
)


class LeftToGraph:
    """The parameters of one model that the autograd graph measures.

    Args:
        model: the module that is called.
        ways: from the graph to their norms.
        coverage: which parameters these are.
        passes: the forward passes under way.
        proofs: of these.
        audit: refuses what turns out not to be measurable.
        options: how the layers are tapped.
    """

    def __init__(
        self,
        model: nn.Module,
        ways: GraphWays,
        coverage: ParameterCoverage,
        passes: Passes,
        proofs: Proofs,
        audit: Audit,
        options: LayerOptions,
    ) -> None:
        self._ways, self._coverage, self._passes, self._proofs = ways, coverage, passes, proofs
        self._audit, self._options = audit, options
        self._keepers = Keepers(model, coverage, passes, options.max_replay_bytes, options.max_replay_flops)
        self._with_own_graph: list[tuple[str, nn.Module, OwnGraph, dict[str, str]]] = []  # from the next pass on

    def attach(self) -> None:
        """Put hooks on the modules that keep their tensors."""
        self._keepers.attach()

    def detach(self) -> None:
        """Take these hooks off."""
        self._keepers.detach()

    def sites_with_own_graphs(self, signs: Signs) -> Iterator[LayerSite]:
        """Return sites of modules that run again in the backward pass from now on, and have kept their tensors inside
        checkpoints so far. Once each of them is tapped, its module keeps nothing more."""
        self._keepers.keep_again()
        for at, module, rule, names in self._with_own_graph:
            if not self._coverage.by_graph.keys() >= set(names.values()):
                continue
            site = LayerSite(self._passes, at or ROOT, module, rule, names, self._options, signs)
            site.tap_from_now()
            yield site
            self._keepers.leave(at)
            for name in names.values():
                self._coverage.leave_to_own_graph(name, module)
        self._with_own_graph = []

    def follow(self, run: LayerPass, output: Any) -> None:
        """Put hooks on the graph of a pass; raise nothing."""
        passes, call, run.call = self._passes, run.call, None
        if call is None or not self._coverage.by_graph or not passes.recording:
            return
        names = dict(self._coverage.by_graph)
        parameters = {n: p for n, p in self._coverage.measured().items() if n in names}
        run.by_graph = frozenset(names)
        if not parameters:
            return
        try:
            with reading(run.kept):
                run.replay, refused, unproved = self._ways.follow(
                    *(output, call, run.batch, parameters, functools.partial(_counts, passes, run), passes.fail),
                    begins=run.begins if self._options.output is None else run.begins or Begins(None, run.batch),
                    due=run.due,
                )
                if run.replay is not None:
                    run.replay.sums = run.sums
            if unproved == BY_ZERO:
                self._proofs.ask_soon(run)
            run.unproved = run.unproved or unproved
            run.proved = run.proved and not unproved
            later = {name for name, why in refused.items() if why == HOOKED and self._keepers.widen(name)}
            if later:
                run.spoiled = LATER.format(min(later))
            fused = {name for name, why in refused.items() if why == FUSED and name not in run.left_to_graph}
            if fused:
                run.spoiled = FUSED_THEN.format(min(fused))
                later |= fused
            refused = {n: self._keepers.why(w) if w == HOOKED else w for n, w in refused.items() if n not in later}
            if run.kept is not None and not self._options.normalized:
                self._with_own_graph += self._keepers.own_graphs(output, lambda: uses_of(output, self._coverage))
            self._audit.refuse({n: REFUSED.format(names[n], why) for n, why in refused.items() if n in names})
        except Exception as error:
            passes.fail(error)


def _counts(passes: Passes, run: LayerPass) -> bool:
    return passes.recording and passes.comes_back(run, inner=False)
