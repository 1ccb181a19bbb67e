"""The first passes under audit: does every parameter's every use come through the hooks, and are its norms right?"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lipcore.capture.checkpoints import is_reentrant_checkpoint
from lipcore.capture.layers.broadcast import spread_layers
from lipcore.capture.layers.coverage import GIVEN, OUTSIDE, REENTRANT, UNSEEN, ParameterCoverage
from lipcore.capture.layers.layer_pass import LayerPass, LayerRecord
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.new_gradients import Gradients
from lipcore.capture.layers.proofs import Proofs
from lipcore.capture.layers.reordered import reordered_layers
from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import accumulates_everything
from lipcore.models.outputs import nodes_of, on_backward, tensors_of

_OTHER_TENSOR = "its layer was called with another tensor in its place (a frozen or detached one, functional_call)"

_OTHER_USES = (
    "is used {0} times in the forward pass, but only {1} times by its own layer's call (a function such as F.linear is "
    "given it directly)"
)


class Audit:
    """The questions that a model's first passes are asked and later ones are not.

    Args:
        coverage: loses the parameters whose norms turn out to be wrong.
        sites: every tapped layer.
        compiled: part of the model is compiled, and its graph cannot be looked at.
        skip: leave out parameters that are not covered instead of failing.
        graph: parameters whose rules do not serve are measured from the graph.
        proofs: the proofs of the model's passes.
        fail: gets an error that is found in a backward pass.
        disproved: told why a proof has failed.
    """

    def __init__(
        self,
        model: nn.Module,
        coverage: ParameterCoverage,
        sites: list[LayerSite],
        *,
        compiled: bool,
        skip: bool,
        graph: bool,
        proofs: Proofs,
        fail: Callable[[Exception], None],
        disproved: Callable[[str], None],
    ) -> None:
        self.done = False  #: the first record was looked at
        self._model, self._coverage, self._sites = model, coverage, sites
        self._compiled, self._skip, self._graph = compiled, skip, graph
        self._proofs, self._fail, self._disproved = proofs, fail, disproved
        self._gradients: Gradients | None = None  # before the forward pass
        self._given: set[str] = set()  # parameters that have got their gradient in the forward pass
        self._reentrant = False  # the first pass has a checkpoint whose graph is made in the backward pass

    def before_forward(self) -> None:
        """Note which gradients there are before the forward pass."""
        if not self.done:
            self._gradients = Gradients(self._model, self._coverage)

    def after_forward(self, run: LayerPass, output: Any) -> None:
        """Look at the graph behind the model's output, and prove the pass where a proof is due.

        Raises:
            ValueError: a parameter is not covered, or a layer's output has no batch dimension.
        """
        if run.chained:
            return
        if not self.done and self._gradients is not None:
            self._given = self._gradients.changed()
        try:
            if not self.done and not self._compiled:
                self._reentrant = any(is_reentrant_checkpoint(node) for node in nodes_of(output))
                for site, why in spread_layers(output, run.batch.size):
                    if not self._graph:
                        raise ValueError(why)
                    self._leave_to_graph(dict.fromkeys(site.names.values(), why))
                audit_graph(
                    output,
                    self._coverage,
                    self._sites,
                    run.calls,
                    skip=self._skip,
                    graph=self._graph,
                    sharded=self._proofs.sharded,
                )
        except ValueError:
            if self._proofs.together:
                self._proofs.end(run, output)
            raise
        try:
            wrong = self._proofs.end(run, output)
        except ValueError as error:
            self._disproved(str(error))
            raise
        if run.disproved:
            self._disproved(run.disproved)
        wrong = {name: why for name, why in wrong.items() if name not in self._coverage.by_graph}
        # Said where the proof has found nothing wrong: it knows of this pass alone.
        looks = (not self.done or run.due) and not self._compiled and not run.mixes
        wrong = (self._reordered(run, output) if looks else {}) | wrong
        if self._graph and not run.mixes:
            left = self._without_own_rules(wrong)
            self._leave_to_graph(left)
            wrong = {name: why for name, why in wrong.items() if name not in left}
        self.refuse(wrong)
        suspects, run.suspects = run.suspects, []  # which would keep its graph alive
        for outputs, wrong in suspects:
            on_backward(outputs, functools.partial(self._suspected, run, wrong))

    def _reordered(self, run: LayerPass, output: Any) -> dict[str, str]:
        """Return the parameters of layers whose rows may be other samples' in every pass, and why."""
        found = [
            (site, why)
            for site, why in reordered_layers(output, run.batch.size, joining=self._proofs.orders.vary)
            if site in self._sites
        ]
        by_rule = self._coverage.covered.keys() - self._coverage.by_graph.keys()
        return {name: why for site, why in found for name in site.names.values() if name in by_rule}

    def _without_own_rules(self, wrong: Mapping[str, str]) -> dict[str, str]:
        """Return the parameters that the graph may measure instead of their layers' rules: not those of a rule that
        the user has given."""
        own = {name for site in self._sites if site.has_own_rule for name in site.names.values()}
        return {name: why for name, why in wrong.items() if name not in own}

    def _leave_to_graph(self, wrong: Mapping[str, str]) -> None:
        """Have parameters whose rules were wrong measured from the graph, in this pass already."""
        if wrong and self.done:
            name, why = next(iter(wrong.items()))
            self._disproved(f"parameter '{name}': {why}")
        for name, why in wrong.items():
            self._coverage.leave_to_graph(name, why)
        for site in self._sites:
            if self._coverage.by_graph.keys() >= set(site.names.values()):
                site.leave_to_graph()

    def refuse(self, wrong: Mapping[str, str]) -> None:
        """Uncover parameters; raise ValueError where they are not to be left out."""
        if wrong:
            name, why = next(iter(wrong.items()))
            self._disproved(f"parameter '{name}': {why}")
        for name, why in wrong.items():
            self._coverage.uncover(name, why)
        if wrong and (not self._skip or not self._coverage.covered):
            self._coverage.check()

    def _suspected(self, run: LayerPass, wrong: Mapping[str, str], gradients: Any) -> None:
        """Uncover parameters, in the backward pass, when an output that mixes samples enters the loss; raise
        nothing."""
        if is_proof() or not accumulates_everything():
            return
        run.proved = False
        try:
            self.refuse(wrong)
        except Exception as error:
            self._fail(error)

    def after_backward(self, record: LayerRecord) -> None:
        """Raise ValueError that names parameters which have got a gradient and are not in the first record."""
        if not self.done and not record.broken and record.samples:
            self.done = True
            outside = REENTRANT if self._reentrant else OUTSIDE
            given = dict.fromkeys(self._given, GIVEN)
            before, self._gradients = self._gradients, None
            new = set() if before is None else before.changed(record.norms_sq)
            audit_gradients(self._coverage, new, outside, given, skip=self._skip)


def audit_graph(
    output: Any,
    coverage: ParameterCoverage,
    sites: Iterable[LayerSite],
    calls: Counter[str],
    *,
    skip: bool,
    graph: bool = False,
    sharded: bool = False,
) -> None:
    """Compare the graph behind a forward pass's output with the calls that came through hooks. A parameter that is used
    more often than it was tapped (F.linear on another layer's weight) would get a wrong norm, and is left to the graph
    where `graph` says so."""
    uses, taps = _uses(output), _taps(output, sites)
    for name, parameter in coverage.parameters():
        if not parameter.requires_grad or name not in coverage.covered or name in coverage.by_graph:
            continue
        used = uses.get(id(parameter), 0)
        # A call that the output does not depend on is no use of it.
        if used > max(1, calls[name]) or used > taps[name] or (used < taps[name] and not sharded):
            calls_of = min(calls[name], taps[name])
            why = _OTHER_TENSOR if used < taps[name] else _OTHER_USES.format(used, calls_of)
            if graph:
                coverage.leave_to_graph(name, why)
            else:
                coverage.uncover(name, why)
    if not skip or not coverage.covered:
        coverage.check()


def _taps(output: Any, sites: Iterable[LayerSite]) -> Counter[str]:
    """Count, by parameter, the calls of its layers that are in the graph."""
    mine = {id(site): site for site in sites}
    found: Counter[str] = Counter()
    for node in nodes_of(output):
        site = mine.get(id(getattr(node, "site", None)))
        if site is not None:
            found.update(site.names.values())
    return found


def audit_gradients(
    coverage: ParameterCoverage, new: Container[str], outside: str, known: Mapping[str, str], *, skip: bool
) -> None:
    """Uncover, after the first record, the parameters that have got a gradient which no layer's call has brought:
    `new`. `outside`: what is said of one that the graph measures; `known`: of some where their gradient is from."""
    for name in coverage.measured():
        if name in new:
            coverage.uncover(name, known.get(name, outside if name in coverage.by_graph else UNSEEN))
    if not skip or not coverage.covered:
        coverage.check()


def depends_on(arguments: Any, keywords: Any, parameters: Iterable[Tensor]) -> bool:
    """Return whether a forward pass's input was computed from one of the parameters."""
    inputs = [tensor for tensor in tensors_of((arguments, keywords)) if tensor.grad_fn]
    return bool(inputs) and not _uses(inputs).keys().isdisjoint(map(id, parameters))


def uses_of(output: Any, coverage: ParameterCoverage) -> dict[str, int]:
    """Count the edges of the graph into each parameter, by name."""
    uses = _uses(output)
    return {name: uses.get(id(parameter), 0) for name, parameter in coverage.parameters()}


def _uses(output: Any) -> dict[int, int]:
    """Count the edges of the graph into each parameter, by id. A cast that autocast keeps for several uses counts once
    per use."""
    edges: Counter[Any] = Counter()
    casts: list[tuple[Any, Any]] = []
    leaves: dict[Any, Tensor] = {}
    for node in nodes_of(output):
        for child, _ in node.next_functions:
            if child is None:
                continue
            variable = getattr(child, "variable", None)
            if variable is not None:
                leaves[child] = variable
                if node.name() == "ToCopyBackward0":
                    casts.append((node, child))
            edges[child] += 1
    uses = {id(leaf): edges[child] for child, leaf in leaves.items()}
    for cast, child in casts:
        uses[id(leaves[child])] += max(0, edges[cast] - 1)
    return uses
