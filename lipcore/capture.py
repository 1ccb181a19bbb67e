"""Every hook lipcore registers: how per-sample numbers get out of the backward pass.

A forward hook on each tapped module asks for the gradient at its output, in one of two ways:

* in eager mode by a hook on the node that made the output: nothing is added to the graph, nothing kept alive, right
  behind in-place activations and activation checkpointing;
* inside torch.compile, and where the output does not require a gradient of its own, by an identity autograd.Function
  with a
  *probe*, a fresh leaf of shape [columns, B] whose "gradient" is the per-sample numbers: a pure function that can be
  traced.

Full backward hooks would cost three times as much and fail behind in-place activations. Nothing is raised inside hooks
(it would leave half of the gradients set): errors are kept for the user's next call. Training is bit for bit what it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class _Probe(torch.autograd.Function):
    """Passes the output on; gives the probe the reduced gradient as its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, site: _Site, extra: Any, *saved: Tensor) -> Tensor:
        ctx.site, ctx.extra = site, extra
        ctx.save_for_backward(*saved)
        if site.in_place_after:
            # A view would make the in-place activation that may follow an error. This bumps the version counter, so it
            # is only right behind a module that does not need its output for its own backward.
            ctx.mark_dirty(output)
            return output
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = ctx.site.reduce(grad, ctx.extra, ctx.saved_tensors)
        return (grad, columns, None, None, *(None for _ in ctx.saved_tensors))


class _MicroBatch:
    """One forward pass: its sites and the numbers that have come back from them."""

    __slots__ = ("columns", "entered", "generation", "probes")

    def __init__(self, generation: int) -> None:
        self.entered: list[_Site] = []
        self.columns: dict[_Site, Tensor] = {}
        self.probes: dict[_Site, Tensor] | None = None
        self.generation = generation


class _Site:
    """One tapped module: all taps on it share one hook."""

    def __init__(self, capture: Capture, target: str) -> None:
        self.capture = capture
        self.target = target
        self.taps: list[Tap] = []
        self.name = target
        self.module: nn.Module | None = None  # the first layer is None until it has run
        self.probe: Tensor | None = None  # made ahead of a compiled region

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

    def hook(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._through_probe(module, arguments, output, self.probe) if self.probe is not None else None
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
        if not micro.entered:
            capture.forwards += 1
        micro.entered.append(self)
        if capture.watch is not None:
            capture.follow(self, output)
        node = output.grad_fn
        if node is not None:
            saved, extra = self._save(module, arguments)
            index = output.output_nr
            # On the node and not on the tensor: a fifth of the cost, and an in-place activation cannot get between.
            node.register_prehook(lambda grads: self._came_back(micro, grads[index], extra, saved))
            return None
        probe = _new_probe(self, output)
        micro.probes = {**(micro.probes or {}), self: probe}
        capture.wait_for(micro)
        return self._through_probe(module, arguments, output, probe)

    def _came_back(self, micro: _MicroBatch, grad: Tensor | None, extra: Any, saved: tuple[Tensor, ...]) -> None:
        capture = self.capture
        if grad is None or self in micro.columns or not capture.recording:
            return  # a second backward through the same graph brings the same ratios again
        columns = self.reduce(grad, extra, saved)
        if columns is None:
            return
        micro.columns[self] = columns
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
        self.forwards = 0  # tapped forward passes in grad mode
        self.records = 0  # how many of them came back
        self._on_record, self._on_error = on_record, on_error
        self._handles: list[Any] = []
        self._candidates: list[Any] = []
        self.micro: _MicroBatch | None = None  # the forward pass under way
        self.returning: _MicroBatch | None = None  # the backward pass under way
        self._pending: list[_MicroBatch] = []  # with probes, which are read when the clock ticks
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
        def served(yes: bool) -> None:
            self.tapping = self.recording and not yes
            if yes:
                into.on_served()
            elif self.tapping:
                self.hook_taps()

        self._shortcut = _core.SingleSampleHooks(
            *(first, last, *into.distributions),
            grad_enabled=torch.is_grad_enabled,
            on_change=served,
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
            else:
                site.resolve(target, find_module(self.model, target, "module") if target else unwrap(self.model))

    def hook_taps(self) -> None:
        """Register the forward hooks of all taps, once."""
        if self.tapped:
            return
        self.tapped = True
        if self._shortcut is not None:
            self._shortcut.own_hooks = 1
        self._handles.append(self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=self._compiled))
        for target, site in self._sites.items():
            if not target:
                continue
            if site.module is not None:
                self._handles.append(site.module.register_forward_hook(site.hook))
            else:
                self._look_for_first_layer(site)
        self._handles.append(self.model.register_forward_hook(self._end_forward, always_call=True))
        if not self._compiled:
            self.micro = _MicroBatch(self._generation)  # the shortcut calls this when a forward pass has begun

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
                "module "
                "with input='<module>'"
            )

        def candidate_hook(name: str) -> Callable[..., Any]:
            def found(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
                if site.module is not None or not self.tapping or not torch.is_grad_enabled():
                    return None
                try:
                    site.resolve(name, module)
                except ValueError as error:
                    self.fail(error)
                    return None
                self._handles.append(module.register_forward_hook(site.hook))
                return site.hook(module, arguments, output)

            return found

        self._candidates = [module.register_forward_hook(candidate_hook(name)) for name, module in candidates]

    def close(self) -> None:
        """Remove every hook; what was recorded stays."""
        self.recording = self.tapping = False
        for handle in [*self._handles, *self._candidates]:
            handle.remove()
        self._handles, self._candidates, self._pending = [], [], []

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
        if self._compiled:
            self._arm_probes([*arguments, *(keywords or {}).values()])
            return
        self.micro = _MicroBatch(self._generation)
        if self._wants_watch and self.tapping and torch.is_grad_enabled():
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
                    "module are "
                    "not defined here: name another one with input= or output="
                )
            )
        return None

    def deliver(self, micro: _MicroBatch) -> None:
        """All its numbers are there."""
        self.returning = None
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
        for site in self._sites.values():
            site.probe = None
        if not torch.is_grad_enabled() or not self.tapping:
            return
        first = next((a for a in arguments if isinstance(a, Tensor) and a.dim()), None)
        if first is None:
            self.fail(
                ValueError("model: a compiled model's first tensor argument must have the batch dimension; found none")
            )
            return
        micro = _MicroBatch(self._generation)
        self.forwards += 1
        micro.probes = {site: _new_probe(site, first) for site in self._sites.values()}
        for site, probe in micro.probes.items():
            site.probe = probe
        self.wait_for(micro)

    def wait_for(self, micro: _MicroBatch) -> None:
        """Its probes are read when the clock ticks."""
        self._pending.append(micro)
        if len(self._pending) > _MAX_PENDING:
            self._pending = self._pending[1:]

    def tick(self) -> None:
        """The optimizer has stepped: read the probes; forget forward passes that never came back."""
        if self._pending:
            self._read_probes(forget=True)
            self._generation += 1

    @property
    def nothing_came(self) -> bool:
        """Whether it should have recorded something by now, and has not."""
        served = self._shortcut.served if self._shortcut is not None else 0
        return self.recording and bool(self._sites) and not self.records and not served

    def flush(self) -> None:
        """Read the probes without waiting for a step."""
        self._read_probes(forget=False)

    def _read_probes(self, *, forget: bool) -> None:
        pending, self._pending = self._pending, []
        for micro in dict.fromkeys(pending):
            for site, probe in (micro.probes or {}).items():
                if probe.grad is not None:
                    micro.columns[site] = probe.grad
            if len(micro.columns) == len(self._sites):
                self.deliver(micro)
            elif not forget or micro.generation == self._generation:
                # Its backward may still come: in a pipeline a step can lie between a forward pass and its backward.
                self._pending.append(micro)


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
    if first.bias is None or last.bias is None:
        return None
    uses = [p for module in modules for p in module.parameters() if p is first.bias or p is last.bias]
    return (first, last) if len(uses) == 2 else None
