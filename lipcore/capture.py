"""Every hook lipcore registers: how per-sample numbers get out of the backward pass.

A forward hook on each tapped module asks for the gradient at its output, in one of two ways:

* in eager mode by a hook on the node that made the output: nothing is added to the graph (but an identity where the
  output does not require a gradient of its own), nothing kept alive, right behind in-place activations and activation
  checkpointing;
* inside torch.compile by an identity autograd.Function with a *probe*, a fresh leaf of shape [columns, B] whose
  "gradient" is the per-sample numbers: a pure function that can be traced.

Full backward hooks would cost three times as much and fail behind in-place activations. Nothing is raised inside hooks
(it would leave half of the gradients set): errors are kept for the user's next call. Training is bit for bit what it
was.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.bypass import BypassWatch, watchable
from lipcore.metric import FIRST_LAYER, Record, SingleSample, Tap
from lipcore.names import chain_of, find_module, named_modules, unwrap

FIRST_LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_MAX_PENDING = 1024  # forward passes whose probes may wait for their backward

_in_backward = torch._C._current_graph_task_id  # -1 outside

# Probes of the compiled forward pass under way, by site. As an attribute of a hook a probe would belong to the module
# in torch.compile's eyes, and its size be compiled in: one graph for every size of the batch.
_armed: dict[int, Tensor] = {}
_numbers = itertools.count()


class _Probe(torch.autograd.Function):
    """Passes the output on; gives the probe the reduced gradient as its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, site: _Site, extra: Any, *saved: Tensor) -> Tensor:
        ctx.site, ctx.extra = site, extra
        ctx.save_for_backward(*saved)
        return _passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = ctx.site.reduce(grad, ctx.extra, ctx.saved_tensors)
        return (grad, columns, None, None, *(None for _ in ctx.saved_tensors))


class _Anchored(torch.autograd.Function):
    """Passes an output on that requires no gradient, so that one is computed: for a frozen first layer."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, in_place_after: bool) -> Tensor:
        return _passed_on(ctx, output, in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return None, None, None


def _passed_on(ctx: Any, output: Tensor, in_place_after: bool) -> Tensor:
    if in_place_after:
        # A view would make the in-place activation that may follow an error. This bumps the version counter, so it is
        # only right behind a module that does not need its output for its own backward.
        if not torch.compiler.is_compiling() and output._is_view():
            return output.clone()
        ctx.mark_dirty(output)
        return output
    return output.view_as(output)


class _MicroBatch:
    """One forward pass: its sites and the numbers that have come back from them."""

    __slots__ = ("columns", "delivered", "entered", "generation", "probes", "task")

    def __init__(self, generation: int) -> None:
        self.entered: list[_Site] = []
        self.columns: dict[_Site, Tensor] = {}
        self.probes: dict[_Site, Tensor] | None = None
        self.generation = generation
        self.task = -1  # the backward pass that the columns came from
        self.delivered = False


class _Site:
    """One tapped module: all taps on it share one hook."""

    def __init__(self, capture: Capture, target: str) -> None:
        self.capture = capture
        self.target = target
        self.taps: list[Tap] = []
        self.name = target
        self.module: nn.Module | None = None  # the first layer is None until it has run
        self.number = next(_numbers)

    @property
    def in_place_after(self) -> bool:
        return all(tap.in_place_after for tap in self.taps)

    @property
    def columns(self) -> int:
        return sum(tap.columns for tap in self.taps)

    def resolve(self, name: str, module: nn.Module) -> None:
        for tap in self.taps:
            tap.resolve(name, module)
        self.name, self.module = name, module

    def __reduce__(self) -> tuple[Callable[[], _Site], tuple[()]]:
        return _inert_site, ()  # for pickle and deepcopy: a copied model is not watched

    def hook(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            probe = _armed.get(self.number)
            return None if probe is None else self._through_probe(module, arguments, output, probe)
        capture = self.capture
        if not capture.tapping or not torch.is_grad_enabled():
            return None
        micro = capture.micro
        if micro is None or self in micro.entered or _in_backward() != -1:
            micro = capture.enter_again(self)
            if micro is None:
                return None
        try:
            for tap in self.taps:
                tap.check(output)
        except ValueError as error:
            capture.fail(error)
            return None
        if not micro.entered and micro.probes is None:
            capture.forwards += 1
        micro.entered.append(self)
        if capture.watch is not None:
            capture.follow(self, output)
        result = None
        if output.grad_fn is None:
            output = result = _Anchored.apply(output, capture.anchor, self.in_place_after)  # type: ignore[no-untyped-call]
        saved, extra = self._save(module, arguments)
        made, inner = output, _in_backward() != -1
        if self.in_place_after and output._is_view():
            made = output._base  # an in-place activation would put a node of its own in the place of the view's
        index, shape = made.output_nr, None if made is output else output.shape
        # On the node and not on the tensor: a fifth of the cost, and an in-place activation cannot get between.
        made.grad_fn.register_prehook(lambda grads: self._came_back(micro, grads[index], shape, extra, saved, inner))
        return result

    def _came_back(
        self,
        micro: _MicroBatch,
        grad: Tensor | None,
        shape: torch.Size | None,
        extra: Any,
        saved: tuple[Tensor, ...],
        inner: bool,
    ) -> None:
        capture = self.capture
        if grad is None or micro.delivered or not capture.recording:
            return  # a second backward through the same graph brings the same ratios again
        # A checkpoint's inner backward belongs to the one around it; probes add up over several.
        if not inner and micro.probes is None and micro.task != _in_backward():
            micro.task = _in_backward()
            micro.columns.clear()  # left by a backward pass that did not reach every site
        columns = self.reduce(grad if shape is None else grad.reshape(shape), extra, saved)
        if columns is None:
            return
        before = micro.columns.get(self)
        micro.columns[self] = columns if before is None else before + columns
        capture.returning = micro
        if len(micro.columns) == capture.size:
            capture.deliver(micro)

    def _through_probe(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor, probe: Tensor) -> Tensor:
        saved, extra = self._save(module, arguments)
        result: Tensor = _Probe.apply(output, probe, self, extra, *saved)  # type: ignore[no-untyped-call]
        return result

    def _save(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
        if len(self.taps) == 1:
            return self.taps[0].save(module, arguments)
        parts = [tap.save(module, arguments) for tap in self.taps]
        return tuple(tensor for part, _ in parts for tensor in part), [(len(part), detail) for part, detail in parts]

    def reduce(self, grad: Tensor, extra: Any, saved: tuple[Tensor, ...]) -> Tensor | None:
        if torch.compiler.is_compiling():
            return self._reduce(grad, extra, saved)
        try:
            return self._reduce(grad, extra, saved)
        except Exception as error:
            self.capture.fail(error)
            return None

    def _reduce(self, grad: Tensor, extra: Any, saved: tuple[Tensor, ...]) -> Tensor:
        if len(self.taps) == 1:
            return self.taps[0].reduce(grad, extra, *saved)
        parts, start = [], 0
        for tap, (count, detail) in zip(self.taps, extra, strict=True):
            parts.append(tap.reduce(grad, detail, *saved[start : start + count]))
            start += count
        return torch.cat(parts)


class Capture:
    """All hooks on one model; hands each micro-batch's record to `on_record` once all its numbers are there.

    Args:
        model: the module the training loop calls; torch.compile's result when there is one.
        taps: what is wanted, and where: a canonical module name, FIRST_LAYER, or "" for the model's own output.
        on_record: gets one record per forward pass that was followed by a backward pass.
        on_error: gets what would have been raised inside a hook; capturing has stopped then.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[tuple[Tap, str]],
        on_record: Callable[[Record], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.model = model
        self.recording = True  # False after an error
        self.tapping = True  # False too during a forward pass that the shortcut serves
        self.tapped = False  # whether the taps' hooks are there
        self.anchor = torch.empty(0, requires_grad=True)
        self.forwards = 0  # tapped forward passes in grad mode
        self.records = 0  # how many of them came back
        self._on_record, self._on_error = on_record, on_error
        self._handles: list[Any] = []
        self._tap_handles: list[Any] = []
        self._candidates: list[Any] = []
        self._early: tuple[str, nn.Module] | None = None  # the first candidate of a forward pass that ran without grad
        self.micro: _MicroBatch | None = None  # the forward pass under way
        self.returning: _MicroBatch | None = None  # the backward pass under way
        self.pending: list[_MicroBatch] = []  # with probes, which are read when the clock ticks
        self._generation = 0
        self._sites: dict[str, _Site] = {}
        self._shortcut: Any = None
        for tap, target in taps:
            self._sites.setdefault(target, _Site(self, target)).taps.append(tap)
        self.size = len(self._sites)
        self._last = self._sites.get("")
        self.watch: BypassWatch | None = None  # the input is followed through one forward pass
        self._followers: list[Tap] = []
        self._wants_watch = True
        self._compiled = any(_is_compiled(module) for module in model.modules())

    def __reduce__(self) -> tuple[Callable[[], Capture], tuple[()]]:
        return _inert_capture, ()

    # ---- hooks

    def attach(self, single_sample: SingleSample | None = None) -> None:
        """Register the hooks.

        With `single_sample` batches of one are served from bias gradients where
        that is sure to be right; then the taps are hooked when the first batch comes that the shortcut cannot serve.
        """
        if not self._sites:
            return
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model: was compiled in place by model.compile(), which leaves no room outside the graph; use "
                "compiled = torch.compile(model) and pass `compiled`"
            )
        self._resolve()
        ends = _ends_of_chain(self.model) if single_sample is not None else None
        if ends is not None and single_sample is not None:
            self._use_shortcut(*ends, single_sample)
        else:
            self.hook_taps()

    def _use_shortcut(self, first: nn.Linear, last: nn.Linear, into: SingleSample) -> None:
        before = -1

        def changed(way: int) -> None:
            nonlocal before
            self.tapping = self.recording and way != _core.SERVED
            if way == _core.SERVED:
                if before == _core.CHECKED:
                    self._unhook_taps()  # they were there for one sample
                into.on_served()
            elif self.tapping:
                self.hook_taps()
            before = way

        def checked(r: float, local_lipschitz: float) -> bool:
            return self.recording and into.agrees(r, local_lipschitz)

        self._shortcut = _core.SingleSampleHooks(
            *(first, last, into.distributions),
            grad_enabled=torch.is_grad_enabled,
            on_change=changed,
            on_check=checked,
            on_error=self.fail,
        )
        self._handles += [
            self.model.register_forward_pre_hook(self._shortcut.before_forward),
            first.bias.register_post_accumulate_grad_hook(self._shortcut.after_backward),
        ]

    def _resolve(self) -> None:
        """Settle what can be known before the first forward pass."""
        for target, site in self._sites.items():
            if target == FIRST_LAYER:
                chain = chain_of(unwrap(self.model))
                if chain and isinstance(chain[0][1], FIRST_LAYER_TYPES):
                    site.resolve(*chain[0])
            elif target:
                site.resolve(*find_module(self.model, target, site.taps[0].argument))
            else:
                site.resolve("", unwrap(self.model))

    def hook_taps(self) -> None:
        """Register the forward hooks of all taps, once."""
        if self.tapped:
            return
        self.tapped = True
        handles = self._tap_handles
        handles.append(self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=self._compiled))
        for target, site in self._sites.items():
            if not target:
                continue
            if site.module is not None:
                handles.append(site.module.register_forward_hook(site.hook))
            else:
                self._look_for_first_layer(site)
        handles.append(self.model.register_forward_hook(self._end_forward, always_call=True))
        if self._shortcut is not None:  # it calls this when a forward pass has begun
            self._shortcut.own_hooks = 1
            self.micro = _MicroBatch(self._generation)

    def _unhook_taps(self) -> None:
        for handle in self._tap_handles:
            handle.remove()
        self._tap_handles = []
        self.tapped = False
        self._shortcut.own_hooks = 0

    def _look_for_first_layer(self, site: _Site) -> None:
        """Hook every candidate; the first that runs is it."""
        if self._compiled:
            raise ValueError(
                "input: the first layer of a compiled model cannot be found by watching it run; name it: "
                "input='<module>'"
            )
        candidates = [(n, m) for n, m in named_modules(self.model) if isinstance(m, FIRST_LAYER_TYPES)]
        if not candidates:
            raise ValueError(
                "input: the model has no Linear, Conv1d, Conv2d, Conv3d or Embedding to be its first layer; name a "
                "module with input='<module>'"
            )
        self._candidates = [
            module.register_forward_hook(functools.partial(self._found, site, name)) for name, module in candidates
        ]

    def _found(self, site: _Site, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if site.module is not None or not self.tapping:
            return None
        inside = self.micro is not None
        if not torch.is_grad_enabled():
            if inside and self._early is None:
                self._early = name, module
            return None
        first = name, module
        if self._early is not None:
            # A reentrant checkpoint runs without grad and again in the backward pass; what is under no_grad does not.
            recomputed = _in_backward() != -1 or any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
            first = self._early if recomputed else first
        elif not inside and _in_backward() == -1:
            return None
        try:
            site.resolve(*first)
        except ValueError as error:
            self.fail(error)
            return None
        self._tap_handles.append(first[1].register_forward_hook(site.hook))
        return site.hook(module, arguments, output) if first[1] is module else None

    def close(self) -> None:
        """Remove every hook; what was recorded stays."""
        self.flush()
        self.recording = self.tapping = False
        for handle in [*self._handles, *self._tap_handles, *self._candidates]:
            handle.remove()
        self._handles, self._tap_handles, self._candidates, self.pending = [], [], [], []

    # ---- errors

    def fail(self, error: Exception) -> None:
        """Stop capturing and hand the error on; never raises."""
        if self.recording:
            self.recording = self.tapping = False
            self._on_error(error)

    # ---- one forward pass and its backward

    def _begin_forward(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> None:
        if torch.compiler.is_compiling():
            return
        self._early = None
        self.micro = _MicroBatch(self._generation) if _may_record() else None
        if self._compiled:
            self._arm_probes([*arguments, *(keywords or {}).values()])
        elif self._wants_watch and self.tapping and self.micro is not None:
            self._start_watch(arguments)

    def _start_watch(self, arguments: tuple[Any, ...]) -> None:
        """Follow the input through this one forward pass; the next ones run unwatched."""
        self._wants_watch = False
        if watchable(arguments):
            self.watch = BypassWatch(arguments)
            self.watch.__enter__()  # type: ignore[no-untyped-call]

    def follow(self, site: _Site, output: Tensor) -> None:
        """A site has been reached in the forward pass that is watched."""
        assert self.watch is not None
        followers = [tap for tap in site.taps if tap.follows_input]
        if followers:
            self.watch.first_layer_done(output)
            self._followers += followers
        elif self.watch.bypasses(output):
            for tap in self._followers:
                tap.bypassed()

    def _end_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        result = None
        if output is not None and self._last is not None:  # None: the forward pass raised
            result = self._last.hook(module, arguments, output)
        if torch.compiler.is_compiling():
            return result
        for site in self._sites.values() if self._compiled else ():
            _armed.pop(site.number, None)
        if self.watch is not None:
            self.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.watch = None
        if self._candidates and self._sites[FIRST_LAYER].module is not None:
            for handle in self._candidates:
                handle.remove()
            self._candidates = []
        self.micro = None
        return result

    def enter_again(self, site: _Site) -> _MicroBatch | None:
        """The micro-batch of a call that is not the first of its site in a forward pass; None when it is not part of
        one."""
        if _in_backward() != -1:
            # Activation checkpointing runs the forward again. Where the first run was recorded, this is not another
            # call; where it ran without grad (reentrant), this one belongs to the backward pass under way.
            micro = self.returning
            return None if micro is None or site in micro.entered else micro
        if self.micro is not None:
            self.fail(
                ValueError(
                    f"module '{site.name}' is called twice in one forward pass; per-sample numbers of a reused "
                    "module are not defined here: name another one with input= or output="
                )
            )
        return None

    def deliver(self, micro: _MicroBatch) -> None:
        """All its numbers are there."""
        self.returning = None
        micro.delivered = True
        record: Record = {}
        for site, numbers in micro.columns.items():
            if len(site.taps) == 1:
                record[site.taps[0].key] = numbers
                continue
            start = 0
            for tap in site.taps:
                record[tap.key] = numbers[start : start + tap.columns]
                start += tap.columns
        self.records += 1
        try:
            self._on_record(record)
        except Exception as error:
            self.fail(error)

    # ---- probes

    def _arm_probes(self, arguments: list[Any]) -> None:
        """Probes for a compiled region, which cannot make leaves itself: outside it, from the batch size of the
        input."""
        micro = self.micro
        if micro is None or not self.tapping:
            return
        first = next((a for a in arguments if isinstance(a, Tensor) and a.dim()), None)
        if first is None:
            self.fail(
                ValueError("model: a compiled model's first tensor argument must have the batch dimension; found none")
            )
            return
        self.forwards += 1
        micro.probes = {site: _new_probe(site, first) for site in self._sites.values()}
        _armed.update((site.number, probe) for site, probe in micro.probes.items())
        self.wait_for(micro)

    def wait_for(self, micro: _MicroBatch) -> None:
        """Its probes are read when the clock ticks."""
        self.pending.append(micro)
        if len(self.pending) > _MAX_PENDING:
            self.pending = self.pending[1:]

    def tick(self) -> None:
        """The optimizer has stepped: read the probes; forget forward passes that never came back."""
        if self.pending:
            self._read_probes(forget=True)
            self._generation += 1

    @property
    def unrecorded(self) -> int:
        """Forward passes in grad mode whose backward has not come, or was not one that could be recorded."""
        return self.forwards - self.records + (self._shortcut.abandoned if self._shortcut is not None else 0)

    @property
    def nothing_came(self) -> bool:
        """Whether it should have recorded something by now, and has not."""
        served = self._shortcut.served if self._shortcut is not None else 0
        return self.recording and bool(self._sites) and not self.records and not served

    def flush(self) -> None:
        """Read the probes without waiting for a step."""
        self._read_probes(forget=False)

    def _read_probes(self, *, forget: bool) -> None:
        pending, self.pending = self.pending, []
        for micro in pending:
            if micro.delivered:
                continue
            for site, probe in (micro.probes or {}).items():
                if probe.grad is not None:
                    micro.columns[site] = probe.grad
            if len(micro.columns) == len(self._sites):
                self.deliver(micro)
            elif not forget or micro.generation == self._generation:
                # Its backward may still come: in a pipeline a step can lie between a forward pass and its backward.
                self.pending.append(micro)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Forward passes of this thread are not recorded: lipcore's own, which are no part of the training."""
    _core.pause(1)
    try:
        yield
    finally:
        _core.pause(-1)


def _may_record() -> bool:
    return torch.is_grad_enabled() and not _core.paused()


def _inert_capture() -> Capture:
    """What a copied model has in the place of the hooks of the original's capture."""
    inert = Capture(nn.Identity(), [], lambda record: None, lambda error: None)
    inert.recording = inert.tapping = False
    return inert


def _inert_site() -> _Site:
    return _Site(_inert_capture(), "")


def _inert_shortcut() -> Any:
    layer = SimpleNamespace(_parameters={}, _forward_hooks={}, bias=None)
    never = functools.partial(bool, False)
    distributions = [_core.Distribution() for _ in range(3)]
    return _core.SingleSampleHooks(
        layer, layer, distributions, grad_enabled=never, on_change=never, on_check=never, on_error=never
    )


copyreg.pickle(_core.SingleSampleHooks, lambda hooks: (_inert_shortcut, ()))


def _new_probe(site: _Site, batch: Tensor) -> Tensor:
    return torch.empty(site.columns, len(batch), dtype=torch.float64, device=batch.device, requires_grad=True)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def _ends_of_chain(model: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """First and last Linear of a plain chain whose biases' gradients tell all about a single sample; None when not
    sure."""
    modules = [module for _, module in chain_of(model)]
    if len(modules) < 2 or model._forward_hooks or model._forward_pre_hooks:
        return None
    first, last = modules[0], modules[-1]
    if type(first) is not nn.Linear or type(last) is not nn.Linear or last.out_features != 1:
        return None
    if first.bias is None or last.bias is None or not first.bias.requires_grad:
        return None  # a frozen bias has no gradient to hook
    uses = [p for module in modules for p in module.parameters() if p is first.bias or p is last.bias]
    return (first, last) if len(uses) == 2 else None
