"""One model as it was looked at: its tapped layers, their proofs, and the hooks around its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.compiled import await_second_run, forget_second_runs
from lipcore.capture.gradient_sums import GradientSums
from lipcore.capture.graph.graph_ways import REFUSED, GraphWays
from lipcore.capture.graph.orders import Orders
from lipcore.capture.graph.other_graph import Call
from lipcore.capture.layers.audit import Audit, depends_on
from lipcore.capture.layers.batch_of import batch_of, batch_tensor, doubt_one
from lipcore.capture.layers.batch_of_one import SingleBatches
from lipcore.capture.layers.compared_inputs import compared_parameter
from lipcore.capture.layers.compared_sums import ComparedSums
from lipcore.capture.layers.compile_probes import LayerProbes
from lipcore.capture.layers.compiled_audit import audit_uncompiled
from lipcore.capture.layers.coverage import ParameterCoverage, cover
from lipcore.capture.layers.kept_factors import KeptFactors
from lipcore.capture.layers.layer_pass import OUTPUT, LayerPass, LayerRecord
from lipcore.capture.layers.layer_site import ROOT, LayerSite
from lipcore.capture.layers.left_to_graph import LeftToGraph
from lipcore.capture.layers.missed_passes import MissedPasses
from lipcore.capture.layers.model_hooks import ModelHooks
from lipcore.capture.layers.model_output import tap_output
from lipcore.capture.layers.options import LayerOptions, check_names
from lipcore.capture.layers.passes import Passes
from lipcore.capture.layers.placed_call import leave_out_uncut, refuse_options
from lipcore.capture.layers.proofs import Proofs
from lipcore.capture.layers.structure import Structure
from lipcore.capture.own_nodes import counted, gradients_begun, nodes_of_others
from lipcore.capture.parameters import WeakCall
from lipcore.capture.training_pass import Untraced, is_given_pass, is_training_forward
from lipcore.layers.factor import norms_sq_of
from lipcore.layers.factor_estimate import Signs
from lipcore.models.containers import leaves_of
from lipcore.models.gathered import is_spread
from lipcore.models.reduction import Reduction
from lipcore.models.tensor_parallel import part_ranks


class TappedModel:
    """A look at one model: the layers and parameters that it has found, and the hooks on them, in which nothing may be
    raised. After a change of the model another one takes its place.

    Args:
        model: the module the training loop calls.
        compiled: part of it is compiled.
        passes: its forward passes.
        missed: those that are not recorded.
        sums: what the comparisons of sums have shown.
        signs: the random signs of estimates.
        on_record, on_proof, options: as of :class:`LayerCapture`.

    Attributes:
        kept: the factors of the last record, where they are wanted.
        parts: the ranks that hold parts of parameters (tensor parallelism), None where there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compiled: bool,
        passes: Passes,
        missed: MissedPasses,
        sums: ComparedSums,
        signs: Signs,
        on_record: Callable[[LayerRecord], None],
        on_proof: Callable[[str, bool], None],
        options: LayerOptions,
    ) -> None:
        self._model, self._compiled, self._options = model, compiled, options
        self._passes, self._missed, self._sums, self._signs = passes, missed, sums, signs
        self._on_record, self._on_proof = on_record, on_proof
        self._hooks: ModelHooks | None = None
        self.kept: KeptFactors | None = None
        by_graph = not compiled and options.max_replay_bytes > 0
        # The graph is not read of a model whose parts are on several ranks: none of them runs it again alone.
        self.coverage: ParameterCoverage = cover(model, alike=not by_graph or is_spread(model))
        self.coverage.graph_is_off = not compiled and options.max_replay_bytes == 0
        if by_graph:
            self.coverage.leave_rest_to_graph()
        if compiled:
            self.coverage.tell_compiled()
        self.parts = part_ranks(model, self.coverage.parameters())
        if self.parts is not None:
            refuse_options(options, compiled=compiled)
            leave_out_uncut(self.coverage, self.parts)
        self._compared = "" if self.parts is None else compared_parameter(self.coverage, self.parts)
        self._audited = not options.prove  # as a compiled model
        self._structure = Structure(model)
        orders = Orders()
        self.graph = GraphWays(
            model,
            max_bytes=options.max_replay_bytes,
            max_flops=options.max_replay_flops,
            prove=options.prove,
            whole=options.keep_factors or options.measure is not norms_sq_of,
            orders=orders,
        )
        self.sites = [
            LayerSite(passes, name or ROOT, module, rule, names, options, signs, self.parts)
            for name, module, rule, names in self.coverage.tapped
        ]
        check_names(options, [site.name for site in self.sites], compiled=compiled)
        self.proofs = Proofs(
            *(model, self.sites),
            prove=options.prove,
            skip=options.skip_uncovered,
            graph=by_graph,
            output=options.output,
            orders=orders,
        )
        self._audit = Audit(
            *(model, self.coverage, self.sites),
            compiled=compiled,
            skip=options.skip_uncovered,
            graph=by_graph,
            proofs=self.proofs,
            fail=passes.fail,
            disproved=lambda why: on_proof(why, False),
        )
        self.single = SingleBatches(
            *(self.coverage, self._structure, options.batch_dim, self._serve, self._tap),
            self._begin_forward,
            self._single_came_back,
            lambda: passes.not_accumulated(1),
            lambda failure: on_proof(failure, True),
        )
        passes.reduction, passes.coverage, passes.single = Reduction(model), self.coverage, self.single
        passes.skips = options.skip_uncovered and not compiled
        passes.graph_serves = by_graph and not options.normalized
        self._left_to_graph = LeftToGraph(model, self.graph, self.coverage, passes, self.proofs, self._audit, options)
        self._probes = LayerProbes(self.sites, passes.probe_comes_back)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # a copied or pickled model is not watched

    # ---- the hooks

    @property
    def is_hooked(self) -> bool:
        """True while the hooks are on the model."""
        return self._hooks is not None

    def attach(self) -> None:
        """Register the hooks; raise ValueError when a trainable parameter is not covered."""
        if not self._options.skip_uncovered:
            self.coverage.check()
        if self._compiled:
            self._probes.allow()
            if self._options.keep_factors or self._options.measure is not norms_sq_of:
                raise ValueError(
                    "model: is compiled, and the factors of its samples' gradients stay inside the compiled graph, "
                    "which brings norms alone; run the model in eager mode, or leave out keep_factors="
                )
        begin, end = Untraced(WeakCall(self._begin_forward)), Untraced(WeakCall(self._end_forward))
        self._hooks = ModelHooks(self._model, self.sites, begin, end)
        self.proofs.attach()
        self._left_to_graph.attach()

    def detach(self) -> None:
        """Take the hooks off."""
        if self._hooks is not None:
            self._hooks.remove()
            self.proofs.detach()
        self._left_to_graph.detach()
        self._hooks = None

    def release_factors(self) -> None:
        """Let go of the factors of the last record."""
        if self.kept is not None:
            self.kept.release()
            self.kept = None

    def _serve(self, before_forward: Any, after_forward: Any) -> None:
        if self._hooks is not None:
            self._hooks.serve(before_forward, after_forward)
        for run in self._passes.waiting():
            run.spoiled = "another thread's passes were being served from the gradients"

    def _tap(self) -> None:
        if self._hooks is not None:
            self._hooks.tap()

    # ---- the forward pass

    @counted
    def _begin_forward(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        passes = self._passes
        if torch.compiler.is_compiling():
            return
        forget_second_runs()
        if not self._is_meant() or passes.goes_on(module):
            return
        self.release_factors()
        if not passes.before_forward():
            self._missed.begin(arguments, keywords)
            return
        try:
            self._tap_own_graphs()
            batch = batch_of(arguments, keywords, self._options.batch_dim, self._options.offsets_of)
            options = self._options
            run = LayerPass(batch, self.coverage.frozen_since(), options.measure, options.keep_factors)
            run.left_to_graph, run.compared = frozenset(self.coverage.by_graph), self._compared
            if self._options.note_of is not None:
                run.note = self._options.note_of(arguments, keywords)
            self._structure.check()
            mixing = self.coverage.mixing()
            if mixing and not self._options.skip_uncovered:
                raise ValueError(mixing)
            run.spoiled = mixing
        except Exception as error:
            passes.fail(error)
            self._missed.begin(arguments, keywords)
            return
        waiting = passes.waiting()
        if waiting:
            run.chained = depends_on(arguments, keywords, self.coverage.measured().values())
        if batch.size == 1 and self._may_serve and not run.chained:
            run.proves = not waiting and self.single.may_prove()
        if not self._compiled:
            run.call = Call(arguments, keywords)
        passes.begin(run)
        self.single.stop()  # where another thread has made it serve meanwhile
        if self._compiled:
            leaves = leaves_of((arguments, keywords))
            first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            square = list(first.shape[:2]).count(batch.size) == 2
            passes.as_long_as_large = square and not first.is_floating_point()
            if not self._audited:
                self._audited = True
                try:
                    skip = options.skip_uncovered
                    audit_uncompiled(self._model, (arguments, keywords), batch, self.coverage, self.sites, skip=skip)
                except Exception as error:
                    passes.fail(error)
            self._probes.arm(run, first.device)
        self._audit.before_forward()
        try:
            self.proofs.begin(run, arguments, keywords, batch_tensor(arguments, keywords, batch.dim))
            if run.adds_up and self._adds_up:
                run.sums = GradientSums(self.coverage.measured(), passes.fail)
            if run.call is not None and (self.coverage.by_graph or run.due or not self._audit.done):
                run.call = run.call._replace(begun=self.graph.begun())
        except Exception as error:
            passes.fail(error)
        run.nodes, run.begun = -1 if self._compiled else nodes_of_others(), gradients_begun()

    def _is_meant(self) -> bool:
        """Return whether the forward pass that begins or ends now is the training's, or is to be proved here."""
        return is_training_forward() and (self.proofs.asked is not None or not is_given_pass())

    @property
    def _adds_up(self) -> bool:
        """True where the samples' gradients may be added up and compared."""
        return self._options.prove and not self._compiled and not self.proofs.sharded

    def _tap_own_graphs(self) -> None:
        """Have modules run again in the backward pass that have kept their tensors inside checkpoints so far."""
        if self._audit.done and self._hooks is not None:
            for site in self._left_to_graph.sites_with_own_graphs(self._signs):
                self.sites.append(site)
                self._hooks.add(site)

    @property
    def _may_serve(self) -> bool:
        """True where norms of batches of one might be read from the parameters' gradients."""
        options = self._options
        asks = options.offsets_of or options.note_of or options.loss_of
        one_way = options.normalized or options.keep_factors or asks
        norms_only = options.measure is norms_sq_of and not one_way
        norms_only = norms_only and self.parts is None
        may = norms_only and not self._compiled and not self.coverage.may_mix and not self.coverage.by_graph
        return options.fast_batch_of_one and self._audit.done and may

    @counted
    def _end_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling() or not self._is_meant():
            return None
        passes = self._passes
        if passes.goes_back():
            return None
        run = passes.end(output)
        if self._compiled:
            self._probes.disarm()
        if run is None or output is None:  # None: the forward pass raised
            if passes.stopped and output is not None:
                self._missed.end(output, passes.stopped)
            return None
        if passes.recording or (run.before is not None and self.proofs.together):
            try:
                self._look_at_one(run, arguments, output)
                self._audit.after_forward(run, output)
                if run.sums is None and self._adds_up and self.proofs.operations.is_unknown(run):
                    run.sums = GradientSums(self.coverage.measured(), passes.fail)
            except Exception as error:
                passes.fail(error)
            if run.before is not None:
                self.proofs.miss()
            self._left_to_graph.follow(run, output)
        if self.proofs.asked is not None:
            self.proofs.close_asked(run, passes.stopped)
            passes.drop(run)
            return None
        if passes.recording and self._options.loss_of is not None:
            try:
                run.loss = self._options.loss_of(output, run.batch.size, self.proofs.alone)
            except Exception as error:
                passes.fail(error)
        passes.await_backward(run, output)
        if run.probes:
            await_second_run(output, run.probes)
        return self._tap_output(run, output) if self._options.normalized else None

    def _look_at_one(self, run: LayerPass, arguments: tuple[Any, ...], output: Any) -> None:
        """Look whether a pass that was taken for one of a single sample may have more."""
        if run.batch.size == 1 and self._options.offsets_of is None and not self.proofs.know_larger:
            given = (arguments, {}) if run.call is None else run.call[:2]
            run.unproved = doubt_one(*given, output, run.batch.dim)
            run.proves = run.proves and not run.unproved

    def _tap_output(self, run: LayerPass, output: Any) -> Tensor | None:
        passes = self._passes

        def keep(squares: Tensor) -> None:
            if run.probes:
                run.output_sq = squares
            elif passes.recording and passes.comes_back(run, inner=False):
                run.add_row(OUTPUT, squares)

        try:
            return tap_output(output, run.batch.size, keep)
        except ValueError as error:
            passes.fail(error)
            return None

    # ---- the backward pass

    def deliver(self, run: LayerPass, task: int) -> None:
        """Hand on the record of a pass whose backward pass has ended."""
        passes = self._passes
        try:
            self._audit.refuse(self._probes.read(run))
            run.broken = passes.entangled(run, task) or run.broken
            record = run.record(self.coverage.covered)
            if run.replay is not None:
                by_graph = self.coverage.by_graph
                outside = {n: REFUSED.format(by_graph.get(n, ""), why) for n, why in run.replay.outside().items()}
                record.leave_out(outside)
                self._audit.refuse(outside)
                if run.replay.unproved:
                    self.proofs.ask_soon(run)
            if run.frozen and not record.norms_sq and not record.broken:
                passes.count("all of the parameters that it reached were frozen")
                return
            self._audit.after_backward(record)
            self._sums.compare(run, record, self.coverage, self.proofs.operations)
            # Nothing else may add to the gradients that are compared, or later to those that are served.
            agrees = run.proves and record.fresh and not record.broken and passes.is_alone(run, task)
            agrees = agrees and self.single.compare(record.norms_sq)
            run.proves = False
            passes.records += 1
            self.kept = record.factors
            self._on_record(record)
            if agrees:
                self.single.proved()
            if run.proved:
                run.proved = False
                self._on_proof("", False)
        except Exception as error:
            passes.fail(error)

    def _single_came_back(self, record: LayerRecord) -> None:
        """Hand on the record of a batch of one whose norms were read from its gradients."""
        if not self._passes.recording:
            return
        try:
            if len(record.norms_sq) < len(self.coverage.covered):
                record.explain(self.coverage.covered)
            self._on_record(record)
        except Exception as error:
            self._passes.fail(error)


def _nothing() -> None:
    return None
