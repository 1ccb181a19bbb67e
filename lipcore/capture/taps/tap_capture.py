"""Capture: the hooks of chosen taps on one model, registered and taken off again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lipcore.capture.compiled import await_second_run, forget_second_runs
from lipcore.capture.taps.batch_of_one import ends_of_chain, shortcut_hooks
from lipcore.capture.taps.collector import Collector
from lipcore.capture.taps.compile_probes import Probes
from lipcore.capture.taps.first_layer import FirstLayerFinder
from lipcore.capture.taps.forward_hook import ForwardHook
from lipcore.capture.taps.input_hook import InputHook
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import FIRST_LAYER, InputTap, Record, SingleSample, Tap
from lipcore.capture.training_pass import OfTraining, in_backward, is_given_pass, is_training_forward
from lipcore.models.chains import first_of_chain
from lipcore.models.names import find_module, unwrap
from lipcore.models.torch_internals import compiles_its_call, is_compiled


class Capture:
    """All taps' hooks on one model; each micro-batch's record goes to `on_record` once all its numbers are there.

    Args:
        model: the module the training loop calls; torch.compile's result when there is one.
        taps: what is wanted, and where: a canonical module name, FIRST_LAYER, or "" for the model's own output (of an
            InputTap: input).
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
        self._collector = Collector(on_record, on_error)
        self._sites: dict[str, Site] = {}
        self._at_inputs: list[tuple[InputTap, str]] = []
        for tap, target in taps:
            if isinstance(tap, InputTap):
                self._at_inputs.append((tap, target))
            else:
                self._sites.setdefault(target, Site(target, self._collector.fail)).taps.append(tap)
        self._inputs: list[InputHook] = []
        self._collector.sites = list(self._sites.values())
        self._hooks = {target: ForwardHook(site, self._collector) for target, site in self._sites.items()}
        self._last = self._hooks.get("")
        self._probes = Probes(list(self._sites.values()), self._collector)
        self.pending = self._probes.pending  #: forward passes whose probes are read at the next tick()
        self._compiled = any(is_compiled(module) for module in model.modules())
        self._finder: FirstLayerFinder | None = None
        self._shortcut: Any = None
        self._handles: list[Any] = []
        self._tap_handles: list[Any] = []
        self._hooking = threading.Lock()  # threads that train one model hook the taps one after the other

    def __reduce__(self) -> tuple[Callable[[], Capture], tuple[()]]:
        return inert_capture, ()  # for pickle and deepcopy: a copied model is not watched

    # ---- hooks

    def attach(self, single_sample: SingleSample | None = None) -> None:
        """Register the hooks.

        With `single_sample` batches of one are served from bias gradients where that is sure to be right; then the taps
        are hooked when the first batch comes that the shortcut cannot serve.
        """
        if not self._sites:
            return
        if compiles_its_call(self.model):
            raise ValueError(
                "model: was compiled in place by model.compile(), which leaves no room outside the graph; use "
                "compiled = torch.compile(model) and pass `compiled`"
            )
        self._resolve()
        ends = ends_of_chain(self.model) if single_sample is not None else None
        if ends is None or single_sample is None:
            self._hook_taps()
            return
        self._shortcut = shortcut_hooks(ends, single_sample, self._collector, self._hook_taps, self._unhook_taps)
        self._handles = [
            self.model.register_forward_pre_hook(OfTraining(self._shortcut.before_forward)),
            ends[0].bias.register_post_accumulate_grad_hook(self._shortcut.after_backward),
        ]

    def _resolve(self) -> None:
        """Find the modules and inputs that can be known before the first forward pass."""
        for target, site in self._sites.items():
            if target == FIRST_LAYER:
                first = first_of_chain(self.model)
                if first is not None:
                    site.resolve(*first)
            elif target:
                site.resolve(*find_module(self.model, target, site.taps[0].argument))
            else:
                site.resolve("", unwrap(self.model))
        for tap, target in self._at_inputs:
            self._inputs.append(self._input_hook(tap, target))

    def _input_hook(self, tap: InputTap, target: str) -> InputHook:
        """Return the hook of an input tap. The input of the model's first layer is the model's own where a plain chain
        begins with that layer."""
        first = first_of_chain(self.model)
        at = self.model
        if target and (first is None or first[0] != target):
            at = find_module(self.model, target, tap.argument)[1]
        sites = self._sites.values()
        first_site = next((site for site in sites if tap.first in site.taps), None)
        last_site = next((site for site in sites if tap.last in site.taps and site is not first_site), None)
        hook = InputHook(tap, self.model, at, self._collector, first_site, last_site)
        for site in sites:
            if site.target:
                site.left_alone = hook.leaves_alone
        return hook

    def _hook_taps(self) -> None:
        """Register the forward hooks of all taps, once."""
        with self._hooking:
            if not self._tap_handles:
                self._register_taps()
        if self._shortcut is not None:  # it calls this when a forward pass has begun
            for at in self._inputs:
                at.tap.prepare()
            self._shortcut.own_hooks = 1
            self._collector.begin()

    def _register_taps(self) -> None:
        handles = self._tap_handles
        handles.append(
            self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=self._compiled or bool(self._inputs))
        )
        for at in self._inputs:
            if at.before_casts is not None:
                handles.append(self.model.register_forward_pre_hook(at.before_casts, prepend=True, with_kwargs=True))
            if at.at is not self.model:
                handles.append(at.at.register_forward_pre_hook(at.enter, with_kwargs=True))
        for target, hook in self._hooks.items():
            if not target:
                continue
            if hook.site.module is not None:
                handles.append(hook.site.module.register_forward_hook(hook.after_forward))
            else:
                self._look_for_first_layer(hook)
        handles.append(self.model.register_forward_hook(self._end_forward, always_call=True))

    def _unhook_taps(self) -> None:
        with self._hooking:
            for handle in self._tap_handles:
                handle.remove()
            self._tap_handles.clear()
        self._shortcut.own_hooks = 0

    def _look_for_first_layer(self, hook: ForwardHook) -> None:
        if self._compiled:
            reason = "the first layer of a compiled model cannot be found by watching it run; name it: input='<module>'"
            if not hook.site.optional:
                raise ValueError(f"input: {reason}")
            self._collector.lose(hook.site, reason)
            return
        self._finder = FirstLayerFinder(hook, self._collector, self._tap_handles)
        self._finder.look_in(self.model)

    def close(self) -> None:
        """Remove every hook; records that were delivered stay."""
        self.flush()
        self._collector.check = None
        self._collector.recording = self._collector.tapping = False
        for at in self._inputs:
            at.withdraw()
        if self._finder is not None:
            self._finder.close()
        for tap in (tap for site in self._sites.values() for tap in site.taps):
            tap.close()
        for handles in (self._handles, self._tap_handles):
            for handle in handles:
                handle.remove()
            handles.clear()
        self.pending.clear()

    # ---- one forward pass

    def _begin_forward(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling() or is_given_pass():
            return None
        forget_second_runs()
        if not is_training_forward():
            return self._begin_again(arguments, keywords or {})
        collector = self._collector
        if collector.under_way.micro is not None and collector.under_way.self_calls.goes_on(module):
            return None
        micro = collector.begin()
        if self._finder is not None:
            self._finder.begin_forward()
        if not collector.tapping:
            for at in self._inputs:
                at.withdraw()
            return None
        changed = None
        for at in self._inputs:
            given = (arguments, keywords or {}) if changed is None else changed
            changed = at.begin(micro, *given, compiled=self._compiled) or changed
        if self._compiled and collector.tapping:
            self._probes.arm(micro, [*arguments, *(keywords or {}).values()])
        return changed

    def _begin_again(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if in_backward() == -1 or not self._collector.recording:
            return None
        changed = None
        for at in self._inputs:
            if at.at is self.model:
                changed = at.begin_again(*(changed or (arguments, keywords))) or changed
        return changed

    def _end_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        last = None if output is None else self._last  # None: the forward pass raised
        if torch.compiler.is_compiling():
            return last.after_forward(module, arguments, output) if last is not None else None
        if is_given_pass():
            return None
        if not is_training_forward():
            for at in self._inputs:
                at.end_again()
            return None
        under_way = self._collector.under_way
        if under_way.self_calls.goes_back():
            return None
        micro = under_way.micro
        for inner in () if micro is None else self._collector.threads.end(micro, output):
            micro.spoiled = inner.spoiled = True  # type: ignore[union-attr]
        result = last.tap(module, arguments, output) if last is not None else None
        if self._compiled:
            self._probes.disarm()
            if micro is not None and micro.probes and output is not None:
                await_second_run(output, {site.number: probe for site, probe in micro.probes.items()})
        for at in self._inputs:
            at.end(output, compiled=self._compiled)
        if under_way.micro is not None:
            under_way.micro.sources, under_way.micro.nodes, under_way.micro.look = {}, {}, None
        if self._finder is not None and self._finder.found:
            self._finder.close()
            self._finder = None
        under_way.micro = None
        return result

    # ---- the clock, and what came of it all

    def tick(self) -> None:
        """Read the probes when the optimizer has stepped, and forget forward passes whose backward pass never came."""
        self._collector.check = None
        if self.pending:
            self._probes.read(forget=True)

    def flush(self) -> None:
        """Read the probes without waiting for an optimizer step."""
        self._probes.read(forget=False)

    def fail(self, error: Exception) -> None:
        """Stop capturing and hand the error on; raise nothing."""
        self._collector.fail(error)

    @property
    def to_prove(self) -> dict[InputTap, InputHook]:
        """The input taps of a sharded model, for which a proof that all ranks run shows what nothing else does."""
        return {at.tap: at for at in self._inputs if at.is_sharded}

    @property
    def unrecorded(self) -> int:
        """Number of forward passes in grad mode whose backward pass has not come, or could not be recorded."""
        abandoned = self._shortcut.abandoned if self._shortcut is not None else 0
        return self._collector.forwards - self._collector.records + abandoned

    @property
    def refused(self) -> list[str]:
        """Reasons why backward passes that came through the hooks were not recorded."""
        return sorted(self._collector.refused)

    @property
    def nothing_came(self) -> bool:
        """True where the capture should have recorded something by now, and has not."""
        served = self._shortcut.served if self._shortcut is not None else 0
        return self._collector.recording and bool(self._sites) and not self._collector.records and not served


def inert_capture() -> Capture:
    """Return a capture without hooks, which a copied model gets in the place of the original's."""
    inert = Capture(nn.Identity(), [], lambda record: None, lambda error: None)
    inert._collector.recording = inert._collector.tapping = False
    return inert
