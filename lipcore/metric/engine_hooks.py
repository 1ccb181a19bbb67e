"""The hooks of an engine: what is registered on model, parameters and optimizers, as the metrics want it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.capture.outputs import OutputWatch
from lipcore.capture.parameters import LoadWatch, WeakCall
from lipcore.capture.pipeline_stages import StageWatch
from lipcore.capture.taps.tap_capture import Capture
from lipcore.distributed.group import AUTO
from lipcore.metric.clock import Calls, Clock, ScaledSteps
from lipcore.metric.engine_steps import EngineSteps
from lipcore.metric.failures import Failures
from lipcore.metric.global_windows import GlobalWindows
from lipcore.metric.optimizers import checked_optimizers, refuse_strangers, scaler_inside, updating
from lipcore.metric.ordinary import ordinary
from lipcore.metric.protocol import Metric, Needs
from lipcore.metric.results import HISTORY_BYTES
from lipcore.metric.windows import Windows
from lipcore.models.checks import check_kind
from lipcore.models.gathered import between_steps
from lipcore.models.names import called_inside


class EngineHooks(EngineSteps):
    """The part of an engine that puts hooks on a model and takes them off."""

    @ordinary
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        metrics: Iterable[Metric],
        window_steps: int | None = None,
        window_blocks: int = 1,
        history_limit: int = 1000,
        history_bytes: int = HISTORY_BYTES,
        scaler: Any = None,
        needs_steps: bool = True,
        group: Any = AUTO,
        timeout: float = 60,
        prefix: str = "",
    ) -> None:
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
        self._windows = Windows(window_steps, window_blocks, history_limit, history_bytes)
        self._global = GlobalWindows(group, timeout, history_limit, history_bytes)
        self.metrics = by_name(metrics)
        chosen = list(self.metrics.values())
        for metric in chosen if window_blocks > 1 else ():
            if type(metric).advance is Metric.advance:
                raise ValueError(f"window_blocks: {metric.name} has no sliding windows")
        self.model = model = called_inside(model)
        self._failures = Failures(self.metrics)
        self._listeners = []
        self._steps_here, self._all_counted = 0, True
        self._closed, self._needs_steps, self._asked_for_scaler = False, needs_steps, False
        check_kind(model)
        with between_steps(model):
            self._bind(checked_optimizers(optimizer), scaler, prefix, window_blocks)

    def _bind(self, optimizers: list[Optimizer], scaler: Any, prefix: str, window_blocks: int) -> None:
        """Bind the metrics to the model, and put the hooks on it."""
        model, chosen = self.model, list(self.metrics.values())
        self._optimizers = optimizers
        refuse_strangers(self._optimizers, dict(model.named_parameters()))
        self._step_end = self._make_step_end(self._stepped)
        scaler = scaler_inside(self._optimizers) if scaler is None else scaler
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        for metric in chosen:
            metric.prepare(updating(self._optimizers), scaler, window_blocks)
            metric.prefix = prefix
            metric.ranks_apart = self._global.none_asked_for
            metric.partners = self._global.partners
            metric.before_moves = WeakCall(self._moved_by_hand)
            metric.bind(model)
        needs = {metric: metric.needs() for metric in chosen}
        self._check_clock(needs)
        self._tapping = [metric for metric in chosen if needs[metric].taps]
        self._check_callable(model, [metric for metric in chosen if needs[metric].taps or needs[metric].layers])
        self._find_step_calls()
        taps = [tap for metric in self._tapping for tap in needs[metric].taps.items()]
        self._capture = Capture(model, taps, self._observe_record, self._stop)
        for metric in self._tapping:
            metric.counted(self)
        self._layer_captures = []
        try:
            self._tap_layers(needs)
            self._attach(needs)
        except Exception:
            for capture in self._layer_captures:
                capture.close()  # nobody else could, and their metrics would stay taken
            raise
        self._watch()

    @staticmethod
    def _check_callable(model: nn.Module, metrics: list[Metric]) -> None:
        if metrics and isinstance(model, nn.ModuleDict) and not _is_called(model):
            raise ValueError(
                f"model: {metrics[0].name} watches the forward pass of one module, not of a dict of them; pass "
                "the module your loop calls"
            )

    def _check_clock(self, needs: dict[Metric, Needs]) -> None:
        early = [metric.name for metric, wanted in needs.items() if wanted.before_step]
        if early and not self._optimizers:
            raise ValueError(
                f"optimizer: {early[0]} looks at the parameters right before every step (source 'snapshot'), and "
                "monitor.step() is called after it; pass the optimizer, or choose another source"
            )

    def _attach(self, needs: dict[Metric, Needs]) -> None:
        try:
            # The shortcut is for the one metric that can do with two bias gradients.
            single_sample = needs[self._tapping[0]].single_sample if len(self._tapping) == 1 else None
            self._capture.attach(single_sample)
        except ValueError as error:
            self._capture.close()
            if not self._turn_off(error):
                raise

    def _tap_layers(self, needs: dict[Metric, Needs]) -> None:
        """Make one capture of all layers for each metric that wants them tapped."""
        for metric, wanted in needs.items():
            if wanted.layers is None:
                continue
            observe = functools.partial(self._observe_layers, metric)
            capture = LayerCapture(
                *(self.model, observe, functools.partial(self._stop_metric, metric)),
                *(metric.observe_unrecorded, metric.observe_proof, wanted.layers),
            )
            metric.tapped(capture)
            capture.attach()
            self._layer_captures.append(capture)

    def _watch(self) -> None:
        """Put hooks on optimizers and parameters, as the metrics want them now."""
        needs = {metric: metric.needs() for metric in self.metrics.values()}
        self._wanting = {
            what: [metric for metric, wanted in needs.items() if getattr(wanted, what)]
            for what in ("gradients", "before_step", "used_gradients", "each_optimizer")
        }
        calls = Calls(self._stepped_once, self._after_skipped_step, self._stop_all, self._step_begins)
        if self._wanting["before_step"]:
            calls.before = self._before_step
        if self._wanting["used_gradients"]:
            calls.uses = self._before_step_of
        if self._wanting["each_optimizer"]:
            calls.each = self._after_step_of
        self._clock = Clock(self._optimizers, calls)
        self._load_watch = LoadWatch(self.model, self._moved_by_hand, self._loaded)
        self._scaled = None
        if self._scaler is not None and self._optimizers:
            self._scaled = ScaledSteps(self._scaler, self._clock, self._after_skipped_step)
        self._watch_gradients()
        self._stage_watch = StageWatch(self.model, self._divided)
        self._output_watches = [
            OutputWatch(
                self.model,
                wanted.outputs,
                functools.partial(self._wants_outputs, metric),
                functools.partial(self._observe_output, metric),
            )
            for metric, wanted in needs.items()
            if wanted.outputs is not None and not metric.off
        ]

    def _wants_outputs(self, metric: Metric) -> bool:
        if self._scaled is not None:
            self._scaled.look()  # whether the step before this forward pass was skipped
        return not self._failures.stopped(metric) and metric.wants_outputs()

    def _observe_output(self, metric: Metric, name: str, module: nn.Module, output: Any) -> None:
        self._call([metric], lambda metric: metric.observe_output(name, module, output))

    def _unwatch(self) -> None:
        for watch in (self._clock, self._load_watch, self._gradient_watch, self._stage_watch):
            watch.close()
        for outputs in self._output_watches:
            outputs.close()


def by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Return metrics by their names; TypeError for what is none, ValueError for a name that comes twice."""
    named: dict[str, Metric] = {}
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise TypeError(f"metrics: expected lipcore metrics, got {type(metric).__name__}")
        if metric.name in named:
            raise ValueError(f"metrics: two of them are called {metric.name!r}")
        named[metric.name] = metric
    return named


def _is_called(model: nn.Module) -> bool:
    """Return whether a dict of modules has a forward pass of its own."""
    return type(model).forward is not nn.Module.forward
