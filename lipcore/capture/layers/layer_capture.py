"""LayerCapture: taps every layer with a rule, and hands on one record of per-sample squared norms per backward pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from lipcore.capture.compiled import is_compiled
from lipcore.capture.layers.batch_of import OffsetsOf, batch_of
from lipcore.capture.layers.batch_of_one import SingleBatches
from lipcore.capture.layers.broadcast import check_broadcast
from lipcore.capture.layers.compile_probes import LayerProbes
from lipcore.capture.layers.coverage import Coverage, audit_gradients, audit_graph, cover, depends_on
from lipcore.capture.layers.layer_pass import INNER, OUTPUT, LayerPass, LayerRecord, Recomputation
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.model_hooks import ModelHooks
from lipcore.capture.layers.model_output import tap_output
from lipcore.capture.layers.proof import disproved
from lipcore.capture.layers.structure import Structure
from lipcore.capture.parameters import WeakCall
from lipcore.capture.training_pass import (
    GRAPH_OF_GRADIENT,
    NOT_ACCUMULATED,
    Untraced,
    accumulates_everything,
    in_backward,
    is_training_forward,
)
from lipcore.layers import Factor, Outer
from lipcore.layers.factor_estimate import EstimatedOuter, Signs
from lipcore.models.outputs import on_backward

_MAX_STRAY = 64
ROOT = "model"  #: what the model itself is called where it is a layer
STRAYED = (
    "the backward pass came through layers that were called outside the model's forward pass alone (or through the "
    "whole model in a checkpoint with use_reentrant=True)"
)
_CHAINED = (
    "the input of a forward pass depends on the model's own parameters (the output of another forward pass), so its "
    "samples' gradients are spread over several passes; detach() it where that is not meant"
)


class LayerCapture:
    """All layer taps on one model.

    Args:
        model: the module the training loop calls.
        on_record: gets one record per backward pass that accumulates parameter gradients.
        on_error: gets what would have been raised inside a hook; capturing has stopped then.
        on_unrecorded: gets the number of samples and the reason when a backward pass through trained layers is not
            recorded.
        batch_dim: batch dimension of the model's input, and of activations whose features come last.
        offsets_of: takes the model's arguments and keywords to the document boundaries of packed sequences.
        broadcast: names of layers that are called without the batch dimension.
        methods: per layer name, the method its factors are to use.
        fused: take over the weight gradient of Linears that see sequences.
        normalized: also bring the norms of the gradients at the layers' outputs and at the model's.
        skip_uncovered: leave out parameters that no rule covers instead of failing.
        prove: run a backward pass of one sample through the first pass's graph, and compare.
    """

    def __init__(
        self,
        model: nn.Module,
        on_record: Callable[[LayerRecord], None],
        on_error: Callable[[Exception], None],
        on_unrecorded: Callable[[int, str], None],
        *,
        batch_dim: int = 0,
        offsets_of: OffsetsOf | None = None,
        broadcast: tuple[str, ...] = (),
        methods: Mapping[str, str] | None = None,
        fused: bool = False,
        normalized: bool = False,
        skip_uncovered: bool = False,
        prove: bool = True,
    ) -> None:
        self.model = model
        self.batch_dim = batch_dim
        self.fused, self.normalized = fused, normalized
        self.recording = True  # False after an error
        self._active = True  # False in steps that are not to be recorded
        self.as_long_as_large = False  # a compiled model's input has as many positions as samples
        self._thread = threading.local()
        self.records = 0
        self.unrecorded: dict[str, int] = {}  # why backward passes were not recorded, and how many
        self._on_record, self._on_error, self._on_unrecorded = on_record, on_error, on_unrecorded
        self._offsets_of = offsets_of
        self._methods = dict(methods or {})
        self._signs = Signs()
        self._skip_uncovered = skip_uncovered
        self._wants_proof = prove
        self._broadcast = broadcast
        self._compiled = any(is_compiled(module) for module in model.modules())
        self._forgettable: weakref.WeakValueDictionary[int, LayerPass] = weakref.WeakValueDictionary()
        self._last: LayerPass | None = None  # whose end no callback may have told
        self._delivered = self._lost = -1  # numbers of backward passes
        self._returning: set[LayerPass] = set()  # passes of the backward pass under way
        self._stray: dict[int, set[str]] = {}  # per backward pass, parameters of layers called outside a forward pass
        self._grads_before: dict[str, bool] = {}
        self._hooks: ModelHooks | None = None
        self._look()

    def _look(self) -> None:
        """At the model's layers and parameters."""
        self.coverage: Coverage = cover(self.model)
        self.structure = Structure(self.model)
        self.sites = [
            LayerSite(self, name or ROOT, module, rule, names) for name, module, rule, names in self.coverage.tapped
        ]
        sites = {site.name: site for site in self.sites}
        known = ", ".join(map(repr, list(sites)[:8])) + (", ..." if len(sites) > 8 else "")
        for argument, names in (("methods", self._methods), ("broadcast", self._broadcast)):
            for name in names:
                if name not in sites:
                    raise ValueError(f"{argument}: the model has no tapped layer {name!r}; it has {known}")
        if self._compiled and "estimate" in self._methods.values():
            raise ValueError(
                "methods: a compiled model has no 'estimate', whose random numbers would be part of its graph; leave "
                "it out, or run the model in eager mode"
            )
        for name in self._broadcast:
            sites[name].broadcast = True
        self._audited = False
        self._proved = not self._wants_proof
        self.single = SingleBatches(
            *(self.coverage, self.structure, self.batch_dim, self._serve, self._tap),
            *(self._begin_forward, self._single_came_back, lambda: self._not_accumulated(1)),
        )
        self._probes = LayerProbes(self.sites, self._probe_came_back)

    def rebind(self) -> None:
        """Look at the model anew; what was under way does not count."""
        self._unhook()
        self._forgettable.clear()
        self.current = self._last = None
        self._look()
        self.recording = True
        self.attach()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # a copied or pickled model is not watched

    # ---- hooks

    def attach(self) -> None:
        """Register the hooks; ValueError when a trainable parameter is not covered."""
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model: was compiled in place by model.compile(), which leaves no room outside the graph; use "
                "compiled = torch.compile(model) and pass `compiled`"
            )
        if not self._skip_uncovered:
            self.coverage.check()
        if self._compiled:
            self.coverage.check_single_use()
        begin, end = Untraced(WeakCall(self._begin_forward)), Untraced(WeakCall(self._end_forward))
        self._hooks = ModelHooks(self.model, self.sites, begin, end)

    def _serve(self, before_forward: Any, after_forward: Any) -> None:
        if self._hooks is not None:
            self._hooks.serve(before_forward, after_forward)
        for run in self._waiting():
            run.spoiled = "another thread's passes were being served from the gradients"

    def _tap(self) -> None:
        if self._hooks is not None:
            self._hooks.tap()

    def close(self) -> None:
        """Remove every hook; what was recorded stays."""
        self.flush()
        self.recording = False
        self._unhook()

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None

    def fail(self, error: Exception) -> None:
        """Stop capturing and hand the error on; never raises."""
        if self.recording:
            self.recording = False
            self.single.set_active(False)
            self._on_error(error)

    @property
    def current(self) -> LayerPass | None:
        """The forward pass under way in this thread."""
        return getattr(self._thread, "run", None)

    @current.setter
    def current(self, run: LayerPass | None) -> None:
        self._thread.run = run

    @property
    def active(self) -> bool:
        """False in steps that are not to be recorded."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        self.single.set_active(active)

    @property
    def watches(self) -> bool:
        """Whether its hooks are on the model and record."""
        return self.recording and self._hooks is not None

    @property
    def tapping(self) -> bool:
        return self.recording and self._active

    def tuned(self, factor: Factor, layer: str) -> Factor:
        """The factor with the method that was asked for."""
        method = self._methods.get(layer)
        if method == "estimate":
            return EstimatedOuter(factor, self._signs) if isinstance(factor, Outer) else factor
        if method is not None and hasattr(factor, "method"):
            factor.method = method
        return factor

    # ---- the forward pass

    def _begin_forward(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not is_training_forward():
            return
        self.current = None
        self._returning.clear()  # of a backward pass that raised
        if not self.tapping:
            return
        self.flush()
        try:
            run = LayerPass(
                batch_of(arguments, keywords, self.batch_dim, self._offsets_of), self.coverage.frozen_since()
            )
            self.structure.check()
            mixing = self.coverage.mixing()
            if mixing and not self._skip_uncovered:
                raise ValueError(mixing)
            run.spoiled = mixing
        except Exception as error:
            self.fail(error)
            return
        waiting = self._waiting()
        if waiting:
            run.chained = depends_on(arguments, keywords, self.coverage.measured().values())
        if run.batch.size == 1 and self._may_serve and not run.chained:
            run.proves = not waiting and self.single.may_prove()
        self.current = self._last = run
        self._forgettable[id(run)] = run
        self.single.stop()  # where another thread has made it serve meanwhile
        if self._compiled:
            leaves = tree_leaves((arguments, keywords))
            first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            square = list(first.shape[:2]).count(run.batch.size) == 2
            self.as_long_as_large = square and not first.is_floating_point()
            self._probes.arm(run, first.device)
        if not self._audited:
            self._grads_before = {name: p.grad is not None for name, p in self.coverage.parameters()}

    @property
    def _may_serve(self) -> bool:
        """Whether batches of one might be served from the gradients."""
        one_way = self.normalized or self._compiled or self.coverage.batch_statistics or self._offsets_of
        return self._audited and not one_way

    def _end_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling() or not is_training_forward():
            return None
        run, self.current = self.current, None
        if self._compiled:
            self._probes.disarm()
        if run is None or output is None:  # None: the forward pass raised
            return None
        if not self._audited and not self._compiled and not run.chained:
            try:
                check_broadcast(output, run.batch.size)
                audit_graph(output, self.coverage, run.calls, skip=self._skip_uncovered)
            except ValueError as error:
                self.fail(error)
        if not self._proved and run.batch.size > 1 and self.recording and not run.chained:
            self._prove(run, output)
        on_backward(output, lambda _: self._begin_backward(run))
        return self._tap_output(run, output) if self.normalized else None

    def _prove(self, run: LayerPass, output: Any) -> None:
        """The first pass of several samples. Not later ones: beside all that is kept for the backward pass, another
        one's gradients could be the largest memory of the training."""
        self._proved = True
        try:
            wrong = disproved(self.model, run, output, self.coverage, self.sites) or {}
            for name, why in wrong.items():
                self.coverage.uncover(name, why)
            if not self._skip_uncovered or not self.coverage.covered:
                self.coverage.check()
        except Exception as error:
            self.fail(error)

    def _tap_output(self, run: LayerPass, output: Any) -> Tensor | None:
        def keep(squares: Tensor) -> None:
            if run.probes:
                run.output_sq = squares
            elif self.recording and self.comes_back(run, inner=False):
                run.add_row(OUTPUT, squares)

        try:
            return tap_output(output, run.batch.size, keep)
        except ValueError as error:
            self.fail(error)
            return None

    def _open(self) -> list[LayerPass]:
        """Passes whose graph still lives, of every thread."""
        return [run for alive in self._forgettable.valuerefs() if (run := alive()) is not None]

    def _waiting(self) -> list[LayerPass]:
        """Those of them that no backward pass has come back from."""
        return [run for run in self._open() if run.finished_task == -1]

    # ---- the backward pass, in which nothing may be raised

    def pass_of_recomputation(self) -> LayerPass | None:
        """The pass that a forward pass inside the backward belongs to (activation checkpointing)."""
        self.single.enabled = False  # a layer must be tapped again where it was, and be left alone where it was not
        candidates = self._returning
        if not candidates and self.tapping:
            candidates = set(self._waiting())
        if len(candidates) <= 1:
            return next(iter(candidates), None)
        return Recomputation(candidates)

    def _begin_backward(self, run: LayerPass) -> None:
        self._returning.add(run)
        run.entered = in_backward()
        if run.fresh[0] != in_backward():
            run.fresh = in_backward(), all(p.grad is None for p in self.coverage.measured().values())
            if run.probes and self.recording:
                self._after_backward(lambda task: self._nothing_came(run, task))

    def comes_back(self, run: LayerPass, inner: bool) -> bool:
        """Whether what comes back now counts."""
        if inner:  # a checkpoint's own backward belongs to the one around it
            if isinstance(run, Recomputation):
                run.spoil("several forward passes with reentrant checkpoints wait for their backward pass")
                return False
            if run.begin_task(run.entered):
                run.inner_only = True
            return True
        task = in_backward()
        if isinstance(run, Recomputation):
            return False
        if torch.is_grad_enabled():
            run.spoiled = GRAPH_OF_GRADIENT
        if not accumulates_everything():
            if run.refused_task != task:
                run.refused_task = task
                self._not_accumulated(run.batch.size)
            return False
        if run.begin_task(task) or run.inner_only:
            run.inner_only = False
            self._returning.add(run)
            Variable._execution_engine.queue_callback(lambda: self._deliver(run, task))
        return not run.spoiled

    def _after_backward(self, call: Callable[[int], None]) -> None:
        """With the number of this backward pass, at its end and after its records."""
        queue, task = Variable._execution_engine.queue_callback, in_backward()
        queue(lambda: queue(lambda: call(task)))

    def _nothing_came(self, run: LayerPass, task: int) -> None:
        if self.recording and self.records and task not in (run.task, run.finished_task):
            self._not_accumulated(run.batch.size)

    def _only_strays(self, task: int) -> None:
        if self.recording and self.records and task != self._delivered:
            self._count(STRAYED)
            self._on_unrecorded(0, STRAYED)

    def unfollowed(self) -> None:
        """A layer runs in a backward pass, and in no forward pass that was seen."""
        if self.tapping and in_backward() != self._lost:
            self._lost = in_backward()
            self._after_backward(self._only_strays)

    def strayed(self, site: LayerSite) -> None:
        """A layer called outside the model's forward pass gets a gradient."""
        if self.recording and accumulates_everything():
            if in_backward() not in self._stray:
                self._after_backward(self._only_strays)
            self._stray.setdefault(in_backward(), set()).update(site.names.values())
            if len(self._stray) > _MAX_STRAY:  # backward passes that reached no forward pass of the model
                self._stray.pop(next(iter(self._stray), -1), None)

    def _count(self, reason: str) -> None:
        self.unrecorded[reason] = self.unrecorded.get(reason, 0) + 1

    def _not_accumulated(self, samples: int) -> None:
        self.single.flush()  # an earlier pass's record comes first
        self._count(NOT_ACCUMULATED)
        self._on_unrecorded(samples, NOT_ACCUMULATED)

    def _deliver(self, run: LayerPass, task: int) -> None:
        self._returning.discard(run)
        self._delivered = task
        if not self.recording or run.task != task or run.finished_task == task:
            return
        try:
            self._probes.read(run)
            if any(other.chained and other.task == task for other in self._open()):
                run.broken = _CHAINED
            stray = self._stray.pop(task, set())
            for name in stray:
                run.broken = f"the layer of parameter '{name}' was also called outside the model's forward pass"
            record = run.record(self.coverage.covered)
            if run.frozen and not record.norms_sq and not record.broken:
                self._count("all of the parameters that it reached were frozen")
                return
            if not self._audited and not record.broken:
                self._audited = True
                audit_gradients(self.coverage, self._grads_before, record.norms_sq, skip=self._skip_uncovered)
            # Nothing else may add to the gradients that are compared, or later to those that are served.
            others = (other for other in self._open() if other is not run)
            alone = not any(other.task == task or other.finished_task == -1 for other in others)
            if run.proves and record.fresh and not record.broken and alone:
                self.single.prove(record.norms_sq)
            run.proves = False
            self.records += 1
            self._on_record(record)
        except Exception as error:
            self.fail(error)

    def _single_came_back(self, record: LayerRecord) -> None:
        """A batch of one was served from its gradients."""
        if not self.recording:
            return
        try:
            if len(record.norms_sq) < len(self.coverage.covered):
                record.explain(self.coverage.covered)
            self._on_record(record)
        except Exception as error:
            self.fail(error)

    def _probe_came_back(self, run: LayerPass) -> None:
        task = in_backward()
        if self.recording and run.begin_task(task):
            Variable._execution_engine.queue_callback(lambda: self._deliver(run, task))

    def check_that_something_came(self) -> None:
        """After some steps: an error is kept when no backward pass has come through the hooks."""
        if not self.records and not self.unrecorded:
            self.fail(
                ValueError(
                    "model: two optimizer steps were made, but no backward pass came through its hooks. Call the very "
                    "object that was passed as model, in grad mode; attach the Monitor to torch.compile's result, "
                    "before its first call (or torch._dynamo.reset())"
                )
            )

    # ---- passes whose end no callback tells

    def flush(self) -> None:
        """Deliver passes whose every number came back from inner backward passes (reentrant checkpoints), and one whose
        numbers are in the sink."""
        self.single.flush()
        run, self._last = self._last, None
        if run is not None and run.inner_only and in_backward() == -1:
            run.inner_only = False
            self._deliver(run, run.task)
            run.entered = INNER


def _nothing() -> None:
    return None
