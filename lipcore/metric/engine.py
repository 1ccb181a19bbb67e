"""The engine: hooks, clock, errors and windows of any metrics on one model. It knows no metric by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.capture.outputs import OutputWatch
from lipcore.capture.parameters import GradientWatch, LoadWatch, WeakCall
from lipcore.capture.taps.tap import Record
from lipcore.capture.taps.tap_capture import Capture, inert_capture
from lipcore.distributed.group import AUTO
from lipcore.metric.clock import Calls, Clock, ScaledSteps
from lipcore.metric.failures import Failures
from lipcore.metric.global_windows import GlobalWindows
from lipcore.metric.host_reads import OnDevice, fetched
from lipcore.metric.listener import Listener
from lipcore.metric.optimizers import checked_optimizers, refuse_strangers, scaler_above, scaler_inside, updating
from lipcore.metric.ordinary import ordinary
from lipcore.metric.protocol import Metric, Needs
from lipcore.metric.rank_states import SavedRanks, saved
from lipcore.metric.results import HISTORY_BYTES, History, MetricResult, Window
from lipcore.metric.state import checked_lacking, checked_starts, checked_steps
from lipcore.metric.step_end import StepEnd, StepEndCalls
from lipcore.metric.windows import Windows
from lipcore.models.checks import check_kind, never_called
from lipcore.models.names import called_inside

Self = TypeVar("Self", bound="Engine")

_NOT_SAVED = (
    "windows that have closed wait for those of the other ranks, and are not in a state: after a resume no window of "
    "all ranks has steps {0}. Call monitor.global_window() (or monitor.log(), under watch) on all ranks before you save"
)
_WERE_WAITING = (
    "windows that had closed when this state was saved waited for those of the other ranks, and are not in it: no "
    "window of all ranks has steps {0}"
)


class Engine:
    """Driver of metrics on one model while it trains: hooks only, the model and the loop stay as they are.

    The clock is the optimizer's step. Every step the metrics observe; a window of `window_steps` steps then closes by
    itself, or by :meth:`close_window`. Nothing is raised inside a forward or backward pass: an error stops the
    recording, warns, and is raised by the next call of a method of this class or at the end of the with block. So does
    a warning that the filters make an error of.

    Args:
        model: the module the loop calls.
        optimizer: one, or several that step in turn; a step is over when all have. Without: :meth:`step` is called.
        metrics: bound to the model here; their names are the keys of a window.
        window_steps: steps in a window; None: it is closed only by close_window().
        window_blocks: with more than one, windows slide: every window_steps / window_blocks steps one closes that
            covers the last window_steps steps (fewer at the start).
        history_limit: how many closed windows are kept.
        history_bytes: for how many bytes of them.
        scaler: a torch.amp.GradScaler whose scale is to be taken out of gradient norms; by default that of a trainer's
            wrapper around the optimizer.
        needs_steps: nothing is measured without steps, so that a loop in which none is seen is told.
        group: the ranks whose windows :meth:`global_window` merges.
        timeout: seconds that it waits for them.
        prefix: what stands before the names of parameters.
    """

    _version = 3

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
        self._listeners: list[Listener] = []
        self._steps_here = 0  # since this object was made, without those of a loaded state
        self._all_counted = True  # no step has moved the parameters that is not counted, or not yet
        self._closed, self._needs_steps, self._asked_for_scaler = False, needs_steps, False
        check_kind(model)
        self._optimizers = checked_optimizers(optimizer)
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
        self._layer_captures: list[LayerCapture] = []
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

    def _watch_gradients(self) -> None:
        wanted = self._scaled is not None or self._step_end.late or bool(self._wanting["gradients"])
        trained = self._trained()  # one tells that a backward pass begins, nearly always: the last one's is the first
        self._gradient_watch = GradientWatch(
            trained if wanted else trained[-1:], self._after_backward, self._before_backward
        )

    def _stepped(self) -> list[torch.Tensor]:
        """Return parameters that a step moves: without those that follow the master copies that a metric reads."""
        trained = self._trained()
        if not any(metric.reads_masters for metric in self.metrics.values()):
            return trained
        moved = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        return [parameter for parameter in trained if id(parameter) in moved]

    def _trained(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _unwatch(self) -> None:
        for watch in (self._clock, self._load_watch, self._gradient_watch):
            watch.close()
        for outputs in self._output_watches:
            outputs.close()

    def _find_step_calls(self) -> None:
        stepping = [m for m in self.metrics.values() if type(m).observe_step is not Metric.observe_step]
        self._step_calls = [(metric, metric.step_call, metric.settle) for metric in stepping]

    # ---- errors: kept inside hooks, raised by the user's next call

    def _turn_off(self, error: Exception) -> bool:
        """Turn off all that needs the hooks, if it can be done without; return whether that is so."""
        return self._failures.turn_off(self._tapping, error)

    def _stop(self, error: Exception) -> None:
        if not self._turn_off(error):
            self._stop_metrics(self._tapping, error)

    def _stop_all(self, error: Exception) -> None:
        self._stop_metrics(self.metrics.values(), error)

    def _stop_metric(self, metric: Metric, error: Exception) -> None:
        """Stop a metric; the others go on."""
        self._stop_metrics([metric], error)

    def _stop_metrics(self, metrics: Iterable[Metric], error: Exception) -> None:
        self._failures.stop(metrics, error, self._windows.step + 1, self._windows.number)
        self._step_calls = [one for one in self._step_calls if not one[0].off]

    # ---- the clock

    def _observe_record(self, record: Record) -> None:
        self._call(self._tapping, lambda metric: metric.observe_record(record))

    def _observe_layers(self, metric: Metric, record: Any) -> None:
        if self._scaled is not None:
            self._scaled.look()  # whether the step before this backward pass was skipped
        metric.observe_layers(record)

    def _step_begins(self) -> None:
        if not self._asked_for_scaler:
            self._asked_for_scaler = True
            self._look_for_scaler()
        self._at_step_end(self._step_end.step_begins)

    def _look_for_scaler(self) -> None:
        """Tell, at the first step, of a GradScaler that makes it and was not passed: its scale is in every gradient."""
        if self._scaler is None and scaler_above() and (self._wanting["gradients"] or self._layer_captures):
            self._failures.warn(
                f"a GradScaler makes {self._clock}(), and lipcore was given none, so gradient norms hold its scale; "
                "pass it as scaler= (Lightning's: trainer.strategy.precision_plugin.scaler)"
            )
            reason = "a GradScaler makes the step, and lipcore was given none: these numbers hold its scale"
            self._call(self.metrics.values(), lambda metric: metric.observe_unknown_scale(reason))

    def _before_step(self) -> None:
        self._call(self._wanting["before_step"], lambda metric: metric.before_step())

    def _before_step_of(self, optimizer: Optimizer) -> None:
        self._call(self._wanting["used_gradients"], lambda metric: metric.observe_used_gradients(optimizer))

    def _after_step_of(self, optimizer: Optimizer) -> None:
        self._call(self._wanting["each_optimizer"], lambda metric: metric.after_step_of(optimizer))

    def _after_backward(self) -> None:
        if self._scaled is not None:
            self._scaled.look()
        self._call(self._wanting["gradients"], lambda metric: metric.observe_gradients())

    def _before_backward(self) -> None:
        if not self._clock.inside:  # else it is a closure's pass, at weights of its own
            self._at_step_end(self._step_end.backward_begins)

    def _moved_by_hand(self) -> None:
        self._step_end.moved_by_hand()

    def _stepped_once(self) -> None:
        self._all_counted = False
        self._at_step_end(self._step_end.step)

    def _at_step_end(self, call: Callable[[], None]) -> None:
        if self._failures.all_stopped:
            return
        try:
            call()
        except Exception as error:
            self._stop_all(error)

    def _loaded(self) -> None:
        self._call(self.metrics.values(), lambda metric: metric.rebase())
        self._gradient_watch.close()  # load_state_dict(assign=True) makes new parameters
        self._watch_gradients()

    def _call(self, metrics: Iterable[Metric], call: Callable[[Metric], None]) -> None:
        """Call from a hook, in which nothing may be raised."""
        for metric in metrics:
            if self._failures.stopped(metric):
                continue
            try:
                call(metric)
            except Exception as error:
                self._stop_metric(metric, error)

    # ---- weights that move outside the optimizer's step

    def _make_step_end(self, parameters: Callable[[], list[torch.Tensor]]) -> StepEnd:
        calls = StepEndCalls(self._after_step, self._may_wait, self._became_late, self._moved_without_step)
        return StepEnd(parameters, calls, compare=bool(self._optimizers))

    def _bound_to_step(self) -> list[str]:
        return [name for name, metric in self.metrics.items() if metric.needs().at_step]

    def _may_wait(self) -> bool:
        return not self._bound_to_step()

    def _became_late(self) -> None:
        """Tell the metrics and the user that weights move after a step."""
        self._call(self.metrics.values(), lambda metric: metric.observe_late_move())
        later = (
            "From now on a step is read when the next backward pass begins"
            if self._step_end.late
            else f"{self._bound_to_step()[0]} reads the optimizer's own state, so steps are read as before"
        )
        self._failures.warn(
            f"the parameters moved after {self._clock} number {self._windows.step} was over and before the next "
            "backward pass (a wrapper around the optimizer, clipped or averaged weights?); what was recorded of it is "
            f"without that. {later}. Where there is a wrapper, pass it as optimizer="
        )
        self._gradient_watch.close()
        self._watch_gradients()

    def _moved_without_step(self) -> None:
        if not self._needs_steps:
            return
        steps = "monitor.step() was never called" if not self._optimizers else f"{self._clock}() was never seen"
        self._failures.warn(
            f"lipcore has counted no step, although the parameters move: {steps}. Pass as optimizer= the object whose "
            "step() the loop calls (a wrapper, or what is inside it); or pass none and call monitor.step() after every "
            "step"
        )

    def _after_skipped_step(self) -> None:
        if self._scaled is not None:
            self._scaled.ticked = True
        self._capture.tick()
        self._call(self.metrics.values(), lambda metric: metric.observe_skipped_step())

    def _after_step(self) -> None:
        if self._scaled is not None:
            self._scaled.ticked = True
        if self._failures.all_stopped:
            return
        if self._capture.pending:
            self._capture.tick()
        for capture in self._layer_captures:
            capture.flush()
        for metric, call, settle in self._step_calls:
            try:
                if call():
                    settle()
            except Exception as error:  # noqa: PERF203
                self._stop_metric(metric, error)
        try:
            self._windows.step += 1
            self._steps_here += 1
            if self._steps_here == 2:
                for capture in self._layer_captures:
                    capture.check_that_something_came()
                if self._tapping:
                    self._check_that_something_came()
            if self._windows.is_over:
                self._close()
        except Exception as error:
            self._stop_all(error)
        self._all_counted = True

    def _check_that_something_came(self) -> None:
        if not self._capture.nothing_came:
            return
        if self.refused:
            names = " and ".join(metric.name for metric in self._tapping)
            self._failures.warn(f"lipcore has recorded no sample for {names} so far: {'; '.join(self.refused)}")
            return
        self._capture.fail(
            ValueError(
                f"{never_called(self.model)}; name input= and output= when the model's own first layer and output are "
                "not used"
            )
        )

    @property
    def window_steps(self) -> int | None:
        """Steps in a window; None where it is closed only by close_window()."""
        return self._windows.steps

    @property
    def history(self) -> History:
        """The closed windows, oldest first."""
        return self._windows.history

    @property
    def unrecorded(self) -> int:
        """Forward passes of the open window in grad mode that brought no record."""
        return max(0, self._capture.unrecorded - self._windows.unrecorded_before)

    @property
    def refused(self) -> Sequence[str]:
        """Reasons why backward passes that came were not recorded."""
        return self._capture.refused

    @ordinary
    def step(self) -> None:
        """Count a step by hand, after the parameters were updated: for loops without an optimizer object."""
        self._all_counted = False
        self._failures.raise_kept()
        self._stepped_once()
        self._failures.raise_kept()

    @ordinary
    def flush(self) -> None:
        """Take in backward passes that are complete but were not followed by a step yet."""
        self._failures.raise_kept()
        self._step_end.take_waiting()
        if self._scaled is not None and not self._closed:
            self._scaled.look()
        self._capture.flush()
        for capture in self._layer_captures:
            capture.flush()
        self._failures.raise_kept()

    # ---- windows

    @ordinary
    def compute(self) -> Window | None:
        """Return the open window so far, without closing or resetting it. After close(): the window as it was then.

        None when the window is empty, that is before its first step. What backward passes brought since the last step
        is kept, and belongs to the window of the next one.
        """
        self.flush()
        return self._so_far()

    @ordinary
    def close_window(self) -> Window | None:
        """Close the open window now (at the end of an epoch, say), append it to the history and start the next one.

        None when there was no step since the last window closed: nothing is closed then, nothing is added to the
        history, and what backward passes brought since the last step is kept for the next window.
        """
        self.flush()
        if not self._windows.block_steps:
            return None
        window = self._close()
        self._windows.mark_read(window)
        return window

    def pop_window(self) -> Window | None:
        """Return the oldest window that has closed by itself and was not popped yet; None when there is none."""
        self._failures.raise_kept()
        return self._windows.pop()

    @ordinary
    def global_window(self) -> Window | None:
        """Merge the closed windows of all ranks that wait for it, and return the newest; None where none waits.

        Every rank of the group calls it at the same step: where a training loop logs, say. It is a collective; it
        starts none before all ranks have come and have windows of the same steps. What it merges goes to
        :attr:`global_history`. In a process without others it returns the newest window that has closed.

        Raises:
            RuntimeError: a rank has not come in time, or is at another step. No collective was started, the training
                can go on, and the windows wait for the next call.
            ValueError: ranks have different windows, or their parameters are not parts of one model; the message names
                them. These windows are given up; each rank's own stay in its history.
        """
        self._failures.raise_kept()
        newest = self._merge_windows()
        self._failures.raise_kept()  # what the ranks have said may end the training, on all of them here
        return newest

    @ordinary
    def _merge_windows(self) -> Window | None:
        """Merge the windows that wait; what the ranks have said beside them is taken in."""
        newest = self._global.merge(self._windows.step, self._said())
        for window in self._global.last_merged:
            self._tell(lambda listener, window=window: listener.windows_met(window))  # type: ignore[misc]
        if self._global.heard:
            self._heard(self._global.heard)
        return newest

    def _said(self) -> Any:
        """Return what this rank says to the others where windows are merged, JSON-ready."""
        return None

    def _heard(self, said: Sequence[Any]) -> None:
        """Take what each rank has said, in their order."""

    @property
    def global_history(self) -> History:
        """The windows that :meth:`global_window` has merged, oldest first; without other ranks, all closed ones."""
        merged = self._global.history
        return self._windows.history if self._global.stands_alone and not merged else merged

    def _close(self) -> Window:
        window = self._window() if self._windows.final is None else self._windows.final
        window = replace(window, closed=True, results=window.results | self._results_at_close())
        self._windows.close(window, self._capture.unrecorded)
        self._tell(lambda listener: listener.window_closed(window))
        if warning := self._global.keep(window, self.metrics):
            self._failures.warn(warning)
        sliding = self._windows.blocks > 1
        for metric in self.metrics.values():
            if not metric.off:
                self._call([metric], lambda metric: metric.advance() if sliding else metric.reset())
        return window

    def _tell(self, call: Callable[[Listener], None]) -> None:
        """Tell the listeners; one that raises is told no more."""
        for listener in list(self._listeners):
            try:
                call(listener)
            except Exception as error:  # noqa: PERF203
                self._listeners.remove(listener)
                self._failures.warn(
                    f"lipcore's {type(listener).__name__} has ended with {type(error).__name__}: {error}"
                )

    def _results_at_close(self) -> dict[str, MetricResult]:
        """Make results that only closed windows have."""
        return {}

    def _so_far(self) -> Window | None:
        """Return the open window, as it is now or was at close(); None when it has no step."""
        if self._windows.final is not None:
            return self._windows.final
        return self._window() if self._windows.step > self._windows.begin else None

    def _on_device(self, names: Iterable[str]) -> list[OnDevice]:
        found: list[OnDevice] = []
        for name in names:
            try:
                found += self.metrics[name].on_device()
            except Exception as error:  # noqa: PERF203
                self._stop_metric(self.metrics[name], error)
        return found

    def _window(self) -> Window:
        """Make the open window as it is now."""
        results, windows = {}, self._windows
        with fetched(self._on_device(self._failures.readable(windows.number))):
            for name in self._failures.readable(windows.number):
                try:
                    results[name] = _checked_result(name, self.metrics[name].finalize())
                except Exception as error:  # noqa: PERF203
                    self._stop_metric(self.metrics[name], error)
        scope = self._global.scope(self.model, self.metrics.values())
        off = {name: metric.off for name, metric in self.metrics.items() if metric.off}
        return Window(windows.number, windows.begin + 1, windows.step, False, scope, results, off)

    @ordinary
    def rebind(self) -> None:
        """Look at the model anew, after parameters were added, removed, resized, frozen or unfrozen, or changed
        their dtype or device. The open window is closed; statistics of parameters that stayed the same go on, those
        of others start now."""
        self._step_end.take_waiting()
        self._failures.drop_own()
        if self._windows.block_steps:
            with warnings.catch_warnings():  # of parameters that are not watched: this is what is done about them
                warnings.simplefilter("ignore", UserWarning)
                self._close()
        self._failures.start_again()
        for metric in self.metrics.values():
            metric.rebind()
        self._find_step_calls()
        if not self._closed:
            self._unwatch()  # there may be other parameters, and the metrics may want other things
            self._watch()

    # ---- state and end

    @ordinary
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the clock and of the metrics. Closed windows are results and not part of it.

        torch.distributed.checkpoint calls it: ``dcp.save({"lipcore": monitor, ...})`` on all ranks. It is also what
        each rank may write into a file of its own. No rank waits for another."""
        self._step_end.take_waiting()
        waiting = self._global.waiting
        if waiting:
            self._failures.warn(_NOT_SAVED.format(_steps_of(waiting)))
        lacking = self._global.lacking(self._windows.begin)
        own = self._own_state() | {"waiting": [list(steps) for steps in waiting], "lacking": lacking}
        state = saved(self.metrics, self._global.place, own)
        self._tell(lambda listener: listener.state_taken())
        return {"version": self._version, **self._windows.state(), **state}

    @ordinary
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a Monitor with the same metrics on the same model. Where the state does not
        fit, raise a ValueError that names the first wrong key, and change nothing.

        Closed windows with steps behind the state's are dropped, popped or not: the run that made them is given up.

        From a checkpoint of torch.distributed.checkpoint (``dcp.load({"lipcore": monitor, ...})``) a training goes on
        with any number of ranks. A file that one rank has written by itself is that rank's: it has other samples in its
        open window, so that metrics of samples begin this window anew on another rank, with a warning, and are left
        out of it in global windows."""
        self._step_end.moved_by_hand()  # what loads a checkpoint writes into the parameters
        place = self._global.place
        starts = checked_starts(state, self._version, self._windows.blocks)
        ranks = SavedRanks(state, place)
        if ranks.names != sorted(self.metrics):
            raise ValueError(f"metrics: the state has {ranks.names}, this monitor has {sorted(self.metrics)}")
        take_own, lost = self._loaded_own(ranks.first), checked_steps(ranks.first.get("waiting", []))
        lacked = checked_lacking(ranks.taken_over)
        before = {name: metric.state_dict() for name, metric in self.metrics.items()}
        lacking: dict[str, str] = {}
        try:
            for name, metric in self.metrics.items():
                if why := _loaded(name, metric, ranks):
                    lacking[name] = why
        except Exception:
            for name, metric in self.metrics.items():  # all or nothing
                metric.load_state_dict(before[name])
            raise
        take_own()
        self._windows.load(state["step"], state["windows"], starts)
        self._all_counted = True
        self._global.forget(state["step"])
        if lacked is not None:
            self._global.go_on_lacking(lacked)
        self._leave_out(lacking)
        lost = [steps for steps in lost if tuple(steps) not in self._global.waiting]  # of this very run
        if lost:
            self._failures.warn(_WERE_WAITING.format(_steps_of(lost)))
        self._tell(lambda listener: listener.state_loaded(self._windows.step))

    def _own_state(self) -> dict[str, Any]:
        """Return what else this rank saves."""
        return {}

    def _loaded_own(self, own: dict[str, Any]) -> Callable[[], None]:
        """Check what :meth:`_own_state` gave, {} where it goes on from no rank; the function returned takes it over."""
        return lambda: None

    def _leave_out(self, lacking: dict[str, str]) -> None:
        """Leave metrics out of the global window that is open, for these reasons, and warn."""
        if self._windows.step == self._windows.begin:
            return
        for why in dict.fromkeys(lacking.values()):
            names = [name for name, each in lacking.items() if each == why and not self.metrics[name].off]
            if names:
                self._global.leave_out(names, self._windows.step, why)
                self._failures.warn(
                    f"{', '.join(names)}: {why}; they are left out here. Load a checkpoint that all ranks have saved "
                    "together (torch.distributed.checkpoint), the file that each rank has saved, or save at the end of "
                    "a window"
                )

    @ordinary
    def close(self) -> None:
        """Remove every hook and raise an error that was kept; results stay readable."""
        self._shut()
        self._failures.raise_kept()

    def _shut(self) -> None:
        """Remove every hook; errors that come to light are kept."""
        if not self._closed:
            self._step_end.take_waiting()
            if self._scaled is not None:
                self._scaled.look()
            self._closed = True
            self._unwatch()
            self._capture.close()
            for capture in self._layer_captures:
                capture.close()
            for metric in self.metrics.values():
                metric.flush()
            if not self._failures.all_stopped:
                self._windows.final = self._so_far()  # results refer to parameters, which may go on moving
            self._tell(lambda listener: listener.closed())

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: all numbers so far and no model; it is closed, and records nothing."""
        self._step_end.take_waiting()
        windows = copy(self._windows)
        windows.final = windows.final if self._failures.all_stopped else self._so_far()
        gone = ("model", "_scaler", "_scaled", "_clock", "_load_watch", "_gradient_watch", "_step_end", "_capture")
        none: dict[str, list[Any]] = {
            name: [] for name in ("_optimizers", "_tapping", "_step_calls", "_layer_captures", "_output_watches")
        }
        kept = {"_windows": windows, "_closed": True, "_wanting": {}, "_listeners": []}
        return self.__dict__ | dict.fromkeys(gone) | none | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clock = Clock([], Calls(self._after_step, self._after_skipped_step, self._stop_all))
        self._step_end = self._make_step_end(list)
        self._capture = inert_capture()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._abandon()

    def _abandon(self) -> None:
        """Close after an exception that has ended the loop, which goes first: errors that were kept are dropped."""
        if not self._closed:
            self._step_end.drop_waiting()  # the loop has raised in the middle of it
            for metric in self.metrics.values():
                metric.flush()
            self._shut()
        self._failures.drop_kept()


def _steps_of(windows: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first} to {last}" for first, last in windows)


def _loaded(name: str, metric: Metric, ranks: SavedRanks) -> str:
    """Load a metric's states, and return what its open window lacks then; what it raises names the metric."""
    try:
        return metric.load_ranks(ranks.of(name))
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None


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


def _checked_result(name: str, result: Any) -> MetricResult:
    if not isinstance(result, MetricResult):
        raise TypeError(f"{name}: expected finalize() to return a MetricResult, got {type(result).__name__}")
    return result


def _is_called(model: nn.Module) -> bool:
    """Return whether a dict of modules has a forward pass of its own."""
    return type(model).forward is not nn.Module.forward
