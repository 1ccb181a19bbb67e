"""LayerCapture: taps every layer with a rule, and hands on one record of per-sample squared norms per backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.gradient_sums import GradientSums
from lipcore.capture.graph.another_size import HOOKED
from lipcore.capture.graph.frontier import FUSED
from lipcore.capture.graph.graph_ways import REFUSED, GraphWays
from lipcore.capture.graph.kept_tensors import reading
from lipcore.capture.graph.orders import Orders
from lipcore.capture.graph.other_graph import Call
from lipcore.capture.graph.own_graph import OwnGraph
from lipcore.capture.layers.asked_proof import AskedProof
from lipcore.capture.layers.audit import Audit, depends_on, uses_of
from lipcore.capture.layers.batch_of import batch_of, batch_tensor, doubt_one
from lipcore.capture.layers.batch_of_one import SingleBatches
from lipcore.capture.layers.compile_probes import LayerProbes
from lipcore.capture.layers.compiled_audit import audit_uncompiled
from lipcore.capture.layers.coverage import ParameterCoverage, cover
from lipcore.capture.layers.keepers import Keepers
from lipcore.capture.layers.kept_factors import KeptFactors
from lipcore.capture.layers.layer_pass import OUTPUT, LayerPass, LayerRecord
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.missed_passes import MissedPasses
from lipcore.capture.layers.model_hooks import ModelHooks
from lipcore.capture.layers.model_output import tap_output
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.passes import Passes
from lipcore.capture.layers.proofs import Proofs
from lipcore.capture.layers.structure import Structure
from lipcore.capture.own_nodes import counted, gradients_begun, nodes_of_others
from lipcore.capture.parameters import WeakCall
from lipcore.capture.seeds import Begins
from lipcore.capture.training_pass import Untraced, is_given_pass, is_training_forward
from lipcore.capture.zero_mixing import BY_ZERO
from lipcore.layers.factor import norms_sq_of
from lipcore.layers.factor_estimate import Signs
from lipcore.models.checks import never_called
from lipcore.models.containers import leaves_of
from lipcore.models.names import listed
from lipcore.models.torch_internals import compiles_its_call, is_compiled

LATER = (
    "parameter '{0}' is used inside an activation checkpoint, outside of its own module; the next passes keep what is "
    "needed there"
)
FUSED_THEN = (
    "parameter '{0}' is used by others than its own layer, which is fused; in the next passes that layer is not, and "
    "the graph measures it"
)
ROOT = "model"  #: what the model itself is called where it is a layer


class LayerCapture:
    """The taps on all layers of one model.

    Args:
        model: the module the training loop calls.
        on_record: gets one record per backward pass that accumulates parameter gradients.
        on_error: gets what would have been raised inside a hook; capturing has stopped then.
        on_unrecorded: gets the number of samples and the reason when a backward pass through trained layers is not
            recorded.
        on_proof: told that a proof was good (""), or why one has failed, which spoils what came since the last good
            one; and whether it was about passes that were served from the gradients.
        options: how the layers are to be tapped.
    """

    def __init__(
        self,
        model: nn.Module,
        on_record: Callable[[LayerRecord], None],
        on_error: Callable[[Exception], None],
        on_unrecorded: Callable[[int, str], None],
        on_proof: Callable[[str, bool], None],
        options: LayerOptions,
    ) -> None:
        self.model = model
        self.passes = Passes(self._deliver, self._stopped, on_unrecorded)
        self._missed = MissedPasses(options, on_unrecorded)
        self._on_error = on_error
        self._on_record, self._on_proof = on_record, on_proof
        self._options = options
        self._signs = Signs()
        self._compiled = any(is_compiled(module) for module in model.modules())
        self.fuses = options.fused and not self._compiled
        self._hooks: ModelHooks | None = None
        self._kept: KeptFactors | None = None  # of the last record
        self._differs = ""  # what else comes to the parameters, when sums were compared last
        self._added_up = False  # in some pass they were the same
        self.resting = self._rested = False  # the hooks are off, or record nothing; they were, at some time
        self._look()

    # ---- the life cycle

    def _look(self) -> None:
        """Find the model's layers and parameters."""
        passes, options = self.passes, self._options
        by_graph = not self._compiled and options.max_replay_bytes > 0
        self.coverage: ParameterCoverage = cover(self.model, alike=not by_graph)
        self.coverage.graph_is_off = not self._compiled and options.max_replay_bytes == 0
        if by_graph:
            self.coverage.leave_rest_to_graph()
        if self._compiled:
            self.coverage.tell_compiled()
        self._audited = not options.prove  # as a compiled model
        self.structure = Structure(self.model)
        whole = options.keep_factors or options.measure is not norms_sq_of
        bounds = options.max_replay_bytes, options.max_replay_flops
        orders = Orders()
        self.graph = GraphWays(
            self.model, max_bytes=bounds[0], max_flops=bounds[1], prove=options.prove, whole=whole, orders=orders
        )
        self.sites = [
            LayerSite(passes, name or ROOT, module, rule, names, options, self._signs)
            for name, module, rule, names in self.coverage.tapped
        ]
        self._check_names()
        self.proofs = Proofs(
            *(self.model, self.sites),
            prove=options.prove,
            skip=options.skip_uncovered,
            graph=by_graph,
            output=options.output,
            orders=orders,
        )
        self._audit = Audit(
            self.model,
            self.coverage,
            self.sites,
            compiled=self._compiled,
            skip=options.skip_uncovered,
            graph=by_graph,
            proofs=self.proofs,
            fail=passes.fail,
            disproved=lambda why: self._on_proof(why, False),
        )
        self.single = SingleBatches(
            *(self.coverage, self.structure, options.batch_dim, self._serve, self._tap),
            self._begin_forward,
            self._single_came_back,
            lambda: passes.not_accumulated(1),
            lambda failure: self._on_proof(failure, True),
        )
        passes.coverage, passes.single = self.coverage, self.single
        passes.skips = options.skip_uncovered and not self._compiled
        passes.graph_serves = by_graph and not options.normalized
        self._keepers = Keepers(self.model, self.coverage, passes, *bounds)
        self._with_own_graph: list[tuple[str, nn.Module, OwnGraph, dict[str, str]]] = []  # from the next pass on
        self._probes = LayerProbes(self.sites, passes.probe_comes_back)

    def _check_names(self) -> None:
        """Raise ValueError for an argument that names no tapped layer, or for a method that compiled models lack."""
        names = [site.name for site in self.sites]
        known = listed(names)
        for argument, given in (("methods", self._options.methods), ("broadcast", self._options.broadcast)):
            for name in given:
                if name not in names:
                    raise ValueError(f"{argument}: the model has no tapped layer {name!r}; it has {known}")
        if self._compiled and "estimate" in self._options.methods.values():
            raise ValueError(
                "methods: a compiled model has no 'estimate', whose random numbers would be part of its graph; leave "
                "it out, or run the model in eager mode"
            )

    def attach(self) -> None:
        """Register the hooks; raise ValueError when a trainable parameter is not covered."""
        if compiles_its_call(self.model):
            raise ValueError(
                "model: was compiled in place by model.compile(), which leaves no room outside the graph; use "
                "compiled = torch.compile(model) and pass `compiled`"
            )
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
        self._hooks = ModelHooks(self.model, self.sites, begin, end)
        self.proofs.attach()
        self._keepers.attach()

    def _serve(self, before_forward: Any, after_forward: Any) -> None:
        if self._hooks is not None:
            self._hooks.serve(before_forward, after_forward)
        for run in self.passes.waiting():
            run.spoiled = "another thread's passes were being served from the gradients"

    def _tap(self) -> None:
        if self._hooks is not None:
            self._hooks.tap()

    def rest(self) -> None:
        """Record nothing until :meth:`wake`, with the hooks off. Those of a compiled model, which are in its graph, and
        of a sharded one, whose ranks prove passes together, stay, as in a step that is not to be recorded."""
        self.flush()
        self._rested = True
        self.resting = self.passes.recording  # what has stopped, or is closed, will not go on: it is at nobody's rest
        if self._compiled or self.proofs.sharded:
            self.active = False
            return
        self._unhook()
        self.proofs.withdraw()
        self.passes.forget()
        if self._kept is not None:
            self._kept.release()
            self._kept = None

    def wake(self) -> None:
        """Record again, of the model as it is now."""
        if self._hooks is None:
            self.rebind()
        self.resting, self.active = False, True

    def rebind(self) -> None:
        """Look at the model's layers and parameters anew, and drop the passes under way."""
        self.resting = False
        self._unhook()
        self.proofs.withdraw()
        self.passes.forget()
        self._look()
        self.passes.start_again()
        self.attach()

    def close(self) -> None:
        """Remove every hook; records that were delivered stay."""
        self.flush()
        self.proofs.withdraw()
        self.passes.recording = self.resting = False
        self._unhook()

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self.proofs.detach()
        self._keepers.detach()
        self._hooks = None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # a copied or pickled model is not watched

    # ---- what its owner asks

    @property
    def active(self) -> bool:
        """True in steps that are to be recorded; may be set."""
        return self.passes.active

    @active.setter
    def active(self, active: bool) -> None:
        self.passes.begin_step(active=active)
        self.single.set_active(active)

    @property
    def skipped(self) -> bool:
        """True where the last forward pass was in a step that is not to be recorded."""
        return self.passes.skipped

    @property
    def skipped_samples(self) -> int | None:
        """The number of its samples; None where that cannot be told."""
        return self._missed.samples

    @property
    def watches(self) -> bool:
        """True while the hooks are on the model and record."""
        return self.passes.recording and self._hooks is not None

    @property
    def records(self) -> int:
        """The number of backward passes that were recorded."""
        return self.passes.records

    @property
    def unrecorded(self) -> dict[str, int]:
        """The reasons why backward passes were not recorded, each with how many there were."""
        return self.passes.unrecorded

    def flush(self) -> None:
        """Deliver the passes whose end no callback tells; see :meth:`Passes.flush`."""
        self.passes.flush()

    @property
    def proves_at_rest(self) -> bool:
        """True where it rests with the hooks on, and keeps what is proved until it wakes."""
        return self.resting and self.watches and self.proofs.sharded

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Take part in proofs in the with block, also at rest."""
        active = self.active
        if self.resting:
            self.active = True
        try:
            yield
        finally:
            if self.resting:
                self.active = active

    @contextmanager
    def proving(self) -> Iterator[AskedProof]:
        """Prove the pass of the model in the with block, which is none of the training's."""
        asked = self.proofs.ask()
        before = self.passes.last
        try:
            yield asked
        finally:
            self.proofs.miss()
            self.proofs.asked = None
            last = self.passes.last
            if last is not None and last is not before:  # the block has raised
                self.passes.drop(last)

    def finish_proof(self, asked: AskedProof, *, together: bool) -> str:
        """Return what a proof has left unproved after its pass, "" for nothing; with passes that all ranks run, if they
        do it `together`."""
        try:
            asked.finish(together=together)
        except Exception as error:
            asked.answer = asked.answer or str(error)
            self.passes.fail(error)
        return asked.answer

    def check_that_something_came(self) -> None:
        """Keep an error when, after some steps, no backward pass has come through the hooks."""
        if not self.records and not self.unrecorded and not self._rested:
            self.passes.fail(ValueError(never_called(self.model)))

    # ---- the model's hooks, in which nothing may be raised

    @counted
    def _begin_forward(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        passes = self.passes
        if torch.compiler.is_compiling() or not self._is_meant() or passes.goes_on(module):
            return
        if self._kept is not None:
            self._kept.release()
            self._kept = None
        if not passes.before_forward():
            self._missed.begin(arguments, keywords)
            return
        try:
            self._tap_own_graphs()
            batch = batch_of(arguments, keywords, self._options.batch_dim, self._options.offsets_of)
            options = self._options
            run = LayerPass(batch, self.coverage.frozen_since(), options.measure, options.keep_factors)
            run.left_to_graph = frozenset(self.coverage.by_graph)
            if self._options.note_of is not None:
                run.note = self._options.note_of(arguments, keywords)
            self.structure.check()
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
                    audit_uncompiled(self.model, (arguments, keywords), batch, self.coverage, self.sites, skip=skip)
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
        if not self._audit.done or self._hooks is None:
            return
        self._keepers.keep_again()
        for at, module, rule, names in self._with_own_graph:
            if not self.coverage.by_graph.keys() >= set(names.values()):
                continue
            site = LayerSite(self.passes, at or ROOT, module, rule, names, self._options, self._signs)
            site.tap_from_now()
            self.sites.append(site)
            self._hooks.add(site)
            self._keepers.leave(at)
            for name in names.values():
                self.coverage.leave_to_own_graph(name, module)
        self._with_own_graph = []

    @property
    def _may_serve(self) -> bool:
        """True where norms of batches of one might be read from the parameters' gradients."""
        options = self._options
        asks = options.offsets_of or options.note_of or options.loss_of
        one_way = options.normalized or options.keep_factors or asks
        norms_only = options.measure is norms_sq_of and not one_way
        may = norms_only and not self._compiled and not self.coverage.may_mix and not self.coverage.by_graph
        return options.fast_batch_of_one and self._audit.done and may

    @counted
    def _end_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling() or not self._is_meant():
            return None
        passes = self.passes
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
            self._follow_graph(run, output)
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
        return self._tap_output(run, output) if self._options.normalized else None

    def _look_at_one(self, run: LayerPass, arguments: tuple[Any, ...], output: Any) -> None:
        """Look whether a pass that was taken for one of a single sample may have more."""
        if run.batch.size == 1 and self._options.offsets_of is None and not self.proofs.know_larger:
            given = (arguments, {}) if run.call is None else run.call[:2]
            run.unproved = doubt_one(*given, output, run.batch.dim)
            run.proves = run.proves and not run.unproved

    def _follow_graph(self, run: LayerPass, output: Any) -> None:
        """Put hooks on the graph of a pass, for the parameters without a rule."""
        passes, call, run.call = self.passes, run.call, None
        if call is None or not self.coverage.by_graph or not passes.recording:
            return
        names = dict(self.coverage.by_graph)
        parameters = {n: p for n, p in self.coverage.measured().items() if n in names}
        run.by_graph = frozenset(names)
        if not parameters:
            return
        try:
            with reading(run.kept):
                run.replay, refused, unproved = self.graph.follow(
                    *(output, call, run.batch, parameters, functools.partial(_counts, passes, run), passes.fail),
                    begins=run.begins if self._options.output is None else run.begins or Begins(None, run.batch),
                    due=run.due,
                )
                if run.replay is not None:
                    run.replay.sums = run.sums
            if unproved == BY_ZERO:
                self.proofs.ask_soon(run)
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
                self._with_own_graph += self._keepers.own_graphs(output, lambda: uses_of(output, self.coverage))
            self._audit.refuse({n: REFUSED.format(names[n], why) for n, why in refused.items() if n in names})
        except Exception as error:
            passes.fail(error)

    def _stopped(self, error: Exception) -> None:
        self.proofs.withdraw()
        self._on_error(error)

    def _tap_output(self, run: LayerPass, output: Any) -> Tensor | None:
        passes = self.passes

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

    def _deliver(self, run: LayerPass, task: int) -> None:
        """Hand on the record of a pass whose backward pass has ended."""
        passes = self.passes
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
            self._compare_sums(run, record)
            # Nothing else may add to the gradients that are compared, or later to those that are served.
            agrees = run.proves and record.fresh and not record.broken and passes.is_alone(run, task)
            agrees = agrees and self.single.compare(record.norms_sq)
            run.proves = False
            passes.records += 1
            self._kept = record.factors
            self._on_record(record)
            if agrees:
                self.single.proved()
            if run.proved:
                run.proved = False
                self._on_proof("", False)
        except Exception as error:
            passes.fail(error)

    def _compare_sums(self, run: LayerPass, record: LayerRecord) -> None:
        """Note on a record what else than its samples' gradients comes to the parameters, as a pass in which sums are
        compared has shown. Where it was not so in an earlier one, it may have begun in any pass in between."""
        sums, run.sums = run.sums, None
        if sums is not None:
            if not record.broken and self.passes.came_alone(run, record.task):
                rows = record.norms_sq if self._options.measure is norms_sq_of else {}
                found = sums.difference(record.task, rows, self.coverage.covered)
                # Of one sample all passes are compared that are not like others: those before were right.
                if found and not self._differs and self._added_up and run.batch.size > 1:
                    self._on_proof(found, False)
                self._differs = self._differs if found is None else found
                self._added_up |= found == ""
                if found == "":
                    self.proofs.operations.note(run)
            sums.remove()
        else:
            self.proofs.operations.note(run)
        record.differs = self._differs
        record.unproved = self._differs or record.unproved

    def _single_came_back(self, record: LayerRecord) -> None:
        """Hand on the record of a batch of one whose norms were read from its gradients."""
        if not self.passes.recording:
            return
        try:
            if len(record.norms_sq) < len(self.coverage.covered):
                record.explain(self.coverage.covered)
            self._on_record(record)
        except Exception as error:
            self.passes.fail(error)


def _counts(passes: Passes, run: LayerPass) -> bool:
    return passes.recording and passes.comes_back(run, inner=False)


def _nothing() -> None:
    return None
