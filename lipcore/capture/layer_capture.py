"""LayerCapture: taps every layer with a rule, and hands on one record of per-sample squared norms per backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from lipcore import _core
from lipcore.capture.accumulation import Leaves, accumulates_everything
from lipcore.capture.audit import Coverage, audit_graph, cover
from lipcore.capture.collector import in_backward
from lipcore.capture.layer_pass import OUTPUT, LayerPass, LayerRecord
from lipcore.capture.layer_site import LayerSite
from lipcore.capture.probes import armed, is_compiled
from lipcore.capture.single_gradient import gradient_squares, on_backward, served_by_gradients
from lipcore.layers import Batch, Factor

_NOT_ACCUMULATED = "the backward pass did not accumulate all gradients (autograd.grad, or backward(inputs=))"
_MAX_PENDING = 64


class LayerCapture:
    """All layer taps on one model.

    Args:
        model: the module the training loop calls.
        on_record: gets one record per backward pass that accumulates parameter gradients.
        on_error: gets what would have been raised inside a hook; capturing has stopped then.
        batch_dim: batch dimension of the model's input, and of activations whose features come last.
        offsets_of: takes the model's arguments and keywords to the document boundaries of packed sequences.
        broadcast: names of layers that are called without the batch dimension.
        methods: per layer name, the method its factors are to use.
        fused: take over the weight gradient of Linears that see sequences.
        normalized: also bring the norms of the gradients at the layers' outputs and at the model's.
        skip_uncovered: leave out parameters that no rule covers instead of failing.
    """

    def __init__(
        self,
        model: nn.Module,
        on_record: Callable[[LayerRecord], None],
        on_error: Callable[[Exception], None],
        *,
        batch_dim: int = 0,
        offsets_of: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
        broadcast: tuple[str, ...] = (),
        methods: Mapping[str, str] | None = None,
        fused: bool = False,
        normalized: bool = False,
        skip_uncovered: bool = False,
    ) -> None:
        self.model = model
        self.batch_dim = batch_dim
        self.fused, self.normalized = fused, normalized
        self.recording = True  # False after an error
        self.active = True  # False in steps that are not to be recorded
        self.current: LayerPass | None = None  # the forward pass under way
        self.records = 0
        self.forwards = 0
        self.unrecorded: dict[str, int] = {}  # why backward passes were not recorded, and how many
        self._on_record, self._on_error = on_record, on_error
        self._offsets_of = offsets_of
        self._methods = dict(methods or {})
        self._skip_uncovered = skip_uncovered
        self._compiled = any(is_compiled(module) for module in model.modules())
        self.coverage: Coverage = cover(model)
        self.sites = [LayerSite(self, name, module, rule, names) for name, module, rule, names in self.coverage.tapped]
        self._broadcast(broadcast)
        for name in self._methods:
            if name not in {site.name for site in self.sites}:
                raise ValueError(f"methods: the model has no tapped layer {name!r}; it has {self._known()}")
        self._open: weakref.WeakSet[LayerPass] = weakref.WeakSet()
        self._last: LayerPass | None = None
        self._returning: set[LayerPass] = set()  # passes of the backward pass under way
        self._stray: dict[int, set[str]] = {}  # per backward pass, parameters of layers called outside a forward pass
        self._pending: list[LayerPass] = []  # whose probes may have come back
        self._audited = False
        self._leaves = Leaves()
        self._shortcut = True  # batches of one may be served from the gradients
        self._grads_before: dict[str, bool] = {}
        self._handles: list[Any] = []

    def _known(self) -> str:
        names = [repr(site.name) for site in self.sites]
        return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")

    def _broadcast(self, names: tuple[str, ...]) -> None:
        sites = {site.name: site for site in self.sites}
        for name in names:
            if name not in sites:
                raise ValueError(f"broadcast: the model has no tapped layer {name!r}; it has {self._known()}")
            sites[name].broadcast = True

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
        begin, end = _Weak(self._begin_forward), _Weak(self._end_forward)
        self._handles.append(self.model.register_forward_pre_hook(begin, with_kwargs=True))
        for site in self.sites:
            self._handles.append(site.module.register_forward_hook(site, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(end, always_call=True))

    def close(self) -> None:
        """Remove every hook; what was recorded stays."""
        self.flush()
        self.recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def fail(self, error: Exception) -> None:
        """Stop capturing and hand the error on; never raises."""
        if self.recording:
            self.recording = False
            self._on_error(error)

    @property
    def tapping(self) -> bool:
        return self.recording and self.active

    def tuned(self, factor: Factor, layer: str) -> Factor:
        """The factor with the method that was asked for."""
        method = self._methods.get(layer)
        if method is not None and hasattr(factor, "method"):
            factor.method = method
        return factor

    # ---- the forward pass

    def _begin_forward(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.current = None
        if not self.tapping or not torch.is_grad_enabled() or _core.paused() or in_backward() != -1:
            return
        try:
            batch = self._batch(arguments, keywords)
        except ValueError as error:
            self.fail(error)
            return
        self.flush()
        run = LayerPass(batch)
        run.single = self._may_be_single(run)
        self.current = self._last = run
        self._open.add(run)
        self.forwards += 1
        if self._compiled:
            self._arm(run, arguments, keywords)
        if not self._audited:
            self._grads_before = {name: p.grad is not None for name, p in self.coverage.parameters()}

    def _batch(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Batch:
        if self._offsets_of is not None:
            offsets = self._offsets_of(arguments, keywords)
            return Batch(len(offsets) - 1, self.batch_dim, offsets)
        for leaf in tree_leaves((arguments, keywords)):
            if isinstance(leaf, Tensor) and leaf.dim() > self.batch_dim:
                return Batch(leaf.shape[self.batch_dim], self.batch_dim)
        raise ValueError(
            f"model: none of its arguments is a tensor with a dimension {self.batch_dim}, so there is no batch size"
        )

    def _end_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        run, self.current = self.current, None
        for site in self.sites if self._compiled else ():
            armed.pop(site.number, None)
        if run is None or output is None:  # None: the forward pass raised
            return None
        if run.single:
            on_backward(output, lambda: self._single_came_back(run))
            return None
        if not self._audited and not self._compiled:
            try:
                audit_graph(output, self.coverage, run.calls, skip=self._skip_uncovered)
                self._leaves.of(self.coverage.used)
            except ValueError as error:
                self.fail(error)
        return self._tap_output(run, output) if self.normalized else None

    def _tap_output(self, run: LayerPass, output: Any) -> Any:
        if not isinstance(output, Tensor):
            self.fail(
                ValueError(f"model: normalized=True needs an output that is a tensor, got {type(output).__name__}")
            )
            return None
        if not output.requires_grad:
            return None
        if output.numel() != run.batch.size:
            self.fail(
                ValueError(
                    f"model: normalized=True needs one output per sample, {run.batch.size} of them; the output has "
                    f"shape {list(output.shape)}"
                )
            )
            return None
        out = output.view_as(output)

        def keep(grad: Tensor) -> None:
            if self.recording and self.comes_back(run, inner=False):
                run.add_row(OUTPUT, grad.detach().reshape(-1).double().square())

        out.register_hook(keep)
        return out

    # ---- the backward pass, in which nothing may be raised

    def pass_of_recomputation(self) -> LayerPass | None:
        """The pass that a forward pass inside the backward belongs to (activation checkpointing)."""
        candidates = self._returning or {run for run in self._open if run.finished_task != in_backward()}
        if len(candidates) == 1:
            return next(iter(candidates))
        for run in candidates:
            run.broken = "several forward passes with reentrant checkpoints went into one backward pass"
        return None

    def comes_back(self, run: LayerPass, inner: bool) -> bool:
        """Whether what comes back now counts."""
        if inner:  # a checkpoint's own backward belongs to the one around it
            if run.task == -1:
                run.begin_task(0)
            return True
        task = in_backward()
        if torch.is_grad_enabled():
            run.broken = "its graph was differentiated with create_graph=True, so gradients flow along other ways too"
            return False
        if not (self._leaves.all_accumulate() if run.single else accumulates_everything()):
            self._count(_NOT_ACCUMULATED)
            return False
        if run.begin_task(task):
            self._returning.add(run)
            Variable._execution_engine.queue_callback(lambda: self._deliver(run, task))
        return True

    def strayed(self, site: LayerSite) -> None:
        """A layer called outside the model's forward pass gets a gradient."""
        if self.recording and accumulates_everything():
            self._stray.setdefault(in_backward(), set()).update(site.names.values())

    def _count(self, reason: str) -> None:
        self.unrecorded[reason] = self.unrecorded.get(reason, 0) + 1

    def _deliver(self, run: LayerPass, task: int) -> None:
        self._returning.discard(run)
        if not self.recording or run.task != task or run.finished_task == task:
            return
        try:
            self._read_probes(run)
            if run.single and not run.broken:
                self._read_gradients(run)
            stray = self._stray.pop(task, set())
            for name in stray:
                run.broken = f"the layer of parameter '{name}' was also called outside the model's forward pass"
            record = run.record()
            if not self._audited:
                self._audited = True
                self._audit(record)
            self.records += 1
            self._on_record(record)
        except Exception as error:
            self.fail(error)

    def _audit(self, record: LayerRecord) -> None:
        """The first record: is there a parameter with a gradient that nothing brought?"""
        for name, parameter in self.coverage.parameters():
            fresh = parameter.grad is not None and not self._grads_before.get(name, False)
            if fresh and parameter.requires_grad and name not in record.norms_sq and name in self.coverage.covered:
                self.coverage.uncover(name, "has a gradient, but its layer's call did not come through the hooks")
        if not self._skip_uncovered:
            self.coverage.check()

    # ---- batches of one

    def _measured(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.coverage.parameters() if name in self.coverage.covered}

    def _may_be_single(self, run: LayerPass) -> bool:
        if run.batch.size != 1 or self.normalized or self._compiled or not self._audited or not self._shortcut:
            return False
        if any(other.finished_task == -1 for other in self._open):
            return False  # its backward may come together with this one's
        return served_by_gradients(list(self._measured().values()))

    def _single_came_back(self, run: LayerPass) -> None:
        """The backward pass begins."""
        if self.recording and self.comes_back(run, inner=False):
            run.alone = served_by_gradients(list(self._measured().values()))

    def _read_gradients(self, run: LayerPass) -> None:
        if not run.alone or any(other is not run and other.task == run.task for other in self._open):
            self._shortcut = False
            run.broken = (
                "a batch of one was served from the gradients, and another backward pass added to them; from now on "
                "batches of one are tapped"
            )
            return
        for name, square in gradient_squares(self._measured()).items():
            run.calls[name] = 1
            run.add_row(name, square)

    # ---- compiled regions

    def _arm(self, run: LayerPass, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        device = next(leaf.device for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor))
        for site in self.sites:
            probe = torch.empty(
                len(site.columns), run.batch.size, dtype=torch.float64, device=device, requires_grad=True
            )
            probe.register_post_accumulate_grad_hook(_ProbeHook(self, run))
            run.probes[site.number] = probe
            armed[site.number] = probe
        self._pending.append(run)
        del self._pending[:-_MAX_PENDING]

    def _probe_came_back(self, run: LayerPass) -> None:
        task = in_backward()
        if self.recording and run.begin_task(task):
            Variable._execution_engine.queue_callback(lambda: self._deliver(run, task))

    def _read_probes(self, run: LayerPass) -> None:
        for site in self.sites if run.probes else ():
            probe = run.probes[site.number]
            if probe.grad is None:
                continue
            *rows, calls = probe.grad.unbind()
            probe.grad = None
            if bool((calls > 1).any()):
                raise ValueError(
                    f"module '{site.name}' is called more than once in a compiled forward pass; its squares cannot be "
                    "joined there. Run it in eager mode, or leave it out with on_unsupported='skip'"
                )
            for name, row in zip(site.columns, rows, strict=False):
                run.calls[name] += 0
                run.add_row(name, row)
        if run in self._pending:
            self._pending.remove(run)

    # ---- passes whose end no callback tells

    def flush(self) -> None:
        """Deliver passes whose every number came back from inner backward passes (reentrant checkpoints)."""
        run, self._last = self._last, None
        if run is not None and run.task == 0 and in_backward() == -1:
            self._deliver(run, 0)
            run.task = -1


class _Weak:
    """A hook that keeps nothing alive, and does nothing in a copied or pickled model."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else lambda: None

    def __call__(self, *arguments: Any) -> Any:
        method = self._method()
        return method(*arguments) if method is not None else None

    def __reduce__(self) -> tuple[type[_Weak], tuple[()]]:
        return _Weak, ()


class _ProbeHook:
    def __init__(self, capture: LayerCapture, run: LayerPass) -> None:
        self._capture, self._run = capture, weakref.ref(run)

    def __call__(self, probe: Tensor) -> None:
        run = self._run()
        if run is not None:
            self._capture._probe_came_back(run)


def _nothing() -> None:
    return None
