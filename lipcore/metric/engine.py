"""The engine: hooks, clock, errors and windows of any metrics on one model. It knows no metric by name."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.capture.parameters import GradientWatch, LoadWatch, WeakCall
from lipcore.capture.taps.tap import Record
from lipcore.capture.taps.tap_capture import Capture, inert_capture
from lipcore.metric.clock import Calls, Clock, ScaledSteps
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.late_moves import LateMoves
from lipcore.metric.ordinary import ordinary
from lipcore.metric.protocol import Metric, Needs
from lipcore.metric.results import HISTORY_BYTES, History, MetricResult, Window
from lipcore.metric.state import checked_starts
from lipcore.metric.steps import checked_optimizers, refuse_strangers, updating
from lipcore.models.arguments import check_count
from lipcore.models.ranks import world_size

Self = TypeVar("Self", bound="Engine")


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
        scaler: a torch.amp.GradScaler whose scale is to be taken out of gradient norms.
        needs_steps: nothing is measured without steps, so that a loop in which none is seen is told.
    """

    _version = 2

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
    ) -> None:
        if window_steps is not None:
            check_count("window_steps", window_steps)
        check_count("window_blocks", window_blocks)
        check_count("history_limit", history_limit)
        check_count("history_bytes", history_bytes)
        if window_blocks > 1 and (window_steps is None or window_steps % window_blocks):
            raise ValueError(f"window_blocks: {window_blocks} blocks of equal length do not make {window_steps} steps")
        self.metrics = by_name(metrics)
        chosen = list(self.metrics.values())
        for metric in chosen if window_blocks > 1 else ():
            if type(metric).advance is Metric.advance:
                raise ValueError(f"window_blocks: {metric.name} has no sliding windows")
        self.model = model
        self.window_steps = window_steps
        self.history = History(maxlen=history_limit, bytes_limit=history_bytes)
        self._unread = History(maxlen=history_limit, bytes_limit=history_bytes)
        self._step = 0
        self._steps_here = 0  # since this object was made; _step goes on from a loaded state
        self._window_blocks = window_blocks
        self._starts: deque[tuple[int, int]] = deque([(0, 0)], maxlen=window_blocks)  # step, unrecorded of each block
        self._windows = 0
        self._closed, self._needs_steps = False, needs_steps
        self._late = self._is_over = False  # steps are read late; one is to be
        self._late_moves = LateMoves(self._stepped, self._moved_after_step, self._moved_without_step)
        self._final: Window | None = None  # the open window when this was closed
        self._error: Exception | None = None
        self._failed = False  # every metric has stopped
        self._stopped: dict[str, int] = {}  # metrics that an error has stopped, and in which window
        self._optimizers = checked_optimizers(optimizer)
        refuse_strangers(self._optimizers, dict(model.named_parameters()))
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        for metric in chosen:
            metric.prepare(updating(self._optimizers), scaler, window_blocks)
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
            self._capture.attach(single_sample, shared=bool(self._layer_captures))
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
        calls = Calls(self._step_is_over, self._after_skipped_step, self._stop_all, self._step_begins)
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

    def _watch_gradients(self) -> None:
        wanted = self._scaled is not None or self._late or bool(self._wanting["gradients"])
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

    def _find_step_calls(self) -> None:
        stepping = [m for m in self.metrics.values() if type(m).observe_step is not Metric.observe_step]
        self._step_calls = [(metric, metric.step_call, metric.settle) for metric in stepping]

    # ---- errors: kept inside hooks, raised by the user's next call

    def _turn_off(self, error: Exception) -> bool:
        """Turn off all that needs the hooks, with one warning, if it can do without them; return whether it can."""
        optional = isinstance(error, ValueError) and all(metric.optional for metric in self._tapping)
        for metric in self._tapping if optional else ():
            metric.off = str(error)
        if optional and self._tapping:
            self._warn(f"lipcore turned {' and '.join(m.name for m in self._tapping)} off: {error}")
        return optional

    def _stop(self, error: Exception) -> None:
        if not self._turn_off(error):
            self._stop_metrics(self._tapping, error)

    def _stop_all(self, error: Exception) -> None:
        self._stop_metrics(self.metrics.values(), error)

    def _stop_metric(self, metric: Metric, error: Exception) -> None:
        """Stop a metric; the others go on."""
        self._stop_metrics([metric], error)

    def _stop_metrics(self, metrics: Iterable[Metric], error: Exception) -> None:
        stopping = [metric for metric in metrics if not metric.off]
        for metric in stopping:
            metric.off = f"stopped recording in step {self._step + 1}: {error}"
            self._stopped[metric.name] = self._windows
            metric.observe_stop(metric.off)
        self._step_calls = [one for one in self._step_calls if not one[0].off]
        self._failed = all(metric.off for metric in self.metrics.values())
        if stopping:
            self._error = self._error or error
            names = "" if self._failed else f" {' and '.join(metric.name for metric in stopping)}"
            warn_in_hook(f"lipcore stopped recording{names}: {error}", RuntimeWarning, stacklevel=5)

    def _warn(self, message: str) -> None:
        """Warn while the recording goes on; a warning that is to be an error is kept like one."""
        error = warn_in_hook(message, RuntimeWarning, stacklevel=5)
        self._error = self._error or error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        for metric in self.metrics.values():
            error = error or metric.take_error()
        if error is not None:
            raise error

    # ---- the clock

    def _observe_record(self, record: Record) -> None:
        self._call(self._tapping, lambda metric: metric.observe_record(record))

    def _observe_layers(self, metric: Metric, record: Any) -> None:
        if self._scaled is not None:
            self._scaled.look()  # whether the step before this backward pass was skipped
        metric.observe_layers(record)

    def _step_begins(self) -> None:
        """Look at where the last step left the parameters, if no backward pass has come since."""
        self._take_late_step()
        if self._failed or not self._optimizers:
            return
        try:
            self._late_moves.step_begins()
        except Exception as error:
            self._stop_all(error)

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
        if self._failed:
            return
        if self._clock.inside:
            return  # a closure's pass, at weights of its own
        try:
            self._take_late_step()
            self._late_moves.backward_begins()
        except Exception as error:
            self._stop_all(error)

    def _moved_by_hand(self) -> None:
        """Take in the step before, and look for no late move in what the user says is about to change."""
        self._take_late_step()
        self._late_moves.forget()

    def _loaded(self) -> None:
        self._call(self.metrics.values(), lambda metric: metric.rebase())
        self._gradient_watch.close()  # load_state_dict(assign=True) makes new parameters
        self._watch_gradients()

    def _call(self, metrics: Iterable[Metric], call: Callable[[Metric], None]) -> None:
        """Call from a hook, in which nothing may be raised."""
        for metric in metrics:
            if self._stopped and metric.name in self._stopped:
                continue
            try:
                call(metric)
            except Exception as error:
                self._stop_metric(metric, error)

    # ---- weights that move outside the optimizer's step

    def _step_is_over(self) -> None:
        """Take in a step: now, or when the next backward pass begins, where weights go on moving until then."""
        self._take_late_step()
        if self._late:
            self._is_over = True
        else:
            self._after_step()
            self._note_step()

    def _note_step(self) -> None:
        if self._failed:
            return
        try:
            # Where steps are counted by hand, who counts them knows when they are over.
            self._late_moves.step(compare=bool(self._optimizers))
        except Exception as error:
            self._stop_all(error)

    def _take_late_step(self) -> None:
        if self._is_over:
            self._is_over = False
            self._after_step()

    def _moved_after_step(self) -> None:
        bound = [name for name, metric in self.metrics.items() if metric.needs().at_step]
        self._late = not bound
        self._call(self.metrics.values(), lambda metric: metric.observe_late_move())
        later = (
            f"{bound[0]} reads the optimizer's own state, so steps are read as before"
            if bound
            else "From now on a step is read when the next backward pass begins"
        )
        self._warn(
            f"the parameters moved after {self._clock} number {self._step} was over and before the next backward pass "
            "(a wrapper around the optimizer, clipped or averaged weights?); what was recorded of it is without that. "
            f"{later}. Where there is a wrapper, pass it as optimizer="
        )
        self._gradient_watch.close()
        self._watch_gradients()

    def _moved_without_step(self) -> None:
        if not self._needs_steps:
            return
        steps = "monitor.step() was never called" if not self._optimizers else f"{self._clock}() was never seen"
        self._warn(
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
        if self._failed:
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
            self._step += 1
            self._steps_here += 1
            if self._steps_here == 2:
                for capture in self._layer_captures:
                    capture.check_that_something_came()
                if self._tapping:
                    self._check_that_something_came()
            if self.window_steps is not None and self._block_steps >= self.window_steps // self._window_blocks:
                self._close()
        except Exception as error:
            self._stop_all(error)

    def _check_that_something_came(self) -> None:
        if not self._capture.nothing_came:
            return
        if self.refused:
            names = " and ".join(metric.name for metric in self._tapping)
            self._warn(f"lipcore has recorded no sample for {names} so far: {'; '.join(self.refused)}")
            return
        self._capture.fail(
            ValueError(
                "model: two optimizer steps were made, but no backward pass came through its hooks. Call the very "
                "object that was passed as model, in grad mode; attach the Monitor to torch.compile's result, before "
                "its first call (or torch._dynamo.reset()); name input= and output= when the model's own first layer "
                "and output are not used"
            )
        )

    @property
    def unrecorded(self) -> int:
        """Forward passes of the open window in grad mode that brought no record."""
        return max(0, self._capture.unrecorded - self._starts[0][1])

    @property
    def refused(self) -> Sequence[str]:
        """Reasons why backward passes that came were not recorded."""
        return self._capture.refused

    @property
    def _block_steps(self) -> int:
        return self._step - self._starts[-1][0]

    @ordinary
    def step(self) -> None:
        """Count a step by hand, after the parameters were updated: for loops without an optimizer object."""
        self._raise_error()
        self._step_is_over()
        self._raise_error()

    @ordinary
    def flush(self) -> None:
        """Take in backward passes that are complete but were not followed by a step yet."""
        self._raise_error()
        self._take_late_step()
        if self._scaled is not None and not self._closed:
            self._scaled.look()
        self._capture.flush()
        for capture in self._layer_captures:
            capture.flush()
        self._raise_error()

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
        if not self._block_steps:
            return None
        window = self._close()
        self._unread.remove(window)
        return window

    def pop_window(self) -> Window | None:
        """Return the oldest window that has closed by itself and was not popped yet; None when there is none."""
        self._raise_error()
        return self._unread.popleft() if self._unread else None

    def _close(self) -> Window:
        window = self._window() if self._final is None else self._final
        self._final = None
        window = replace(window, closed=True, results=window.results | self._results_at_close())
        self.history.append(window)
        self._unread.append(window)
        self._windows += 1
        self._starts.append((self._step, self._capture.unrecorded))
        for metric in self.metrics.values():
            if not metric.off:
                self._call([metric], lambda metric: metric.advance() if self._window_blocks > 1 else metric.reset())
        return window

    def _results_at_close(self) -> dict[str, MetricResult]:
        """Make results that only closed windows have."""
        return {}

    def _so_far(self) -> Window | None:
        """Return the open window, as it is now or was at close(); None when it has no step."""
        if self._final is not None:
            return self._final
        return self._window() if self._step > self._starts[0][0] else None

    def _window(self) -> Window:
        """Make the open window as it is now."""
        # What a metric had observed until it stopped stands in the window in which that was.
        kept = [name for name, m in self.metrics.items() if not m.off or self._stopped.get(name) == self._windows]
        results = {}
        for name in kept:
            try:
                results[name] = _checked_result(name, self.metrics[name].finalize())
            except Exception as error:  # noqa: PERF203
                self._stop_metric(self.metrics[name], error)
        local = world_size() > 1
        off = {name: metric.off for name, metric in self.metrics.items() if metric.off}
        return Window(self._windows, self._starts[0][0] + 1, self._step, False, local, results, off)

    @ordinary
    def rebind(self) -> None:
        """Look at the model anew, after parameters were added, removed, resized, frozen or unfrozen, or changed
        their dtype or device. The open window is closed; statistics of parameters that stayed the same go on, those
        of others start now."""
        self._take_late_step()
        self._error, self._failed = None, False
        if self._block_steps:
            with warnings.catch_warnings():  # of parameters that are not watched: this is what is done about them
                warnings.simplefilter("ignore", UserWarning)
                self._close()
        for name in self._stopped:
            self.metrics[name].off = ""
            self.metrics[name].reset()
        self._stopped.clear()
        for metric in self.metrics.values():
            metric.rebind()
        self._find_step_calls()
        if not self._closed:
            self._unwatch()  # there may be other parameters, and the metrics may want other things
            self._watch()

    # ---- state and end

    @ordinary
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the clock and of the metrics. Closed windows are results and not part of it."""
        self._take_late_step()
        metrics = {name: metric.state_dict() for name, metric in self.metrics.items()}
        return {
            "version": self._version,
            "step": self._step,
            "starts": [list(start) for start in self._starts],
            "windows": self._windows,
            "metrics": metrics,
        }

    @ordinary
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a Monitor with the same metrics on the same model. Where the state does not
        fit, raise a ValueError that names the first wrong key, and change nothing."""
        self._take_late_step()
        starts = checked_starts(state, self._version, sorted(self.metrics), self._window_blocks)
        before = {name: metric.state_dict() for name, metric in self.metrics.items()}
        try:
            for name, metric in self.metrics.items():
                metric.load_state_dict(state["metrics"][name])
        except Exception:
            for name, metric in self.metrics.items():  # all or nothing
                metric.load_state_dict(before[name])
            raise
        self._step, self._windows = state["step"], state["windows"]
        self._starts.clear()
        self._starts.extend((step, 0) for step in starts)

    @ordinary
    def close(self) -> None:
        """Remove every hook and raise an error that was kept; results stay readable."""
        if not self._closed:
            self._take_late_step()
            if self._scaled is not None:
                self._scaled.look()
            self._closed = True
            self._unwatch()
            self._capture.close()
            for capture in self._layer_captures:
                capture.close()
            for metric in self.metrics.values():
                metric.flush()
            if not self._failed:
                self._final = self._so_far()  # results refer to parameters, which may go on moving
        self._raise_error()

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: all numbers so far and no model; it is closed, and records nothing."""
        self._take_late_step()
        final = self._final if self._failed else self._so_far()
        return self.__dict__ | {
            "model": None,
            "_optimizers": [],
            "_scaler": None,
            "_scaled": None,
            "_error": None,
            "_final": final,
            "_closed": True,
            "_failed": True,
            "_tapping": [],
            "_step_calls": [],
            "_layer_captures": [],
            "_wanting": {},
            "_clock": None,
            "_load_watch": None,
            "_gradient_watch": None,
            "_late_moves": None,
            "_is_over": False,
            "_capture": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clock = Clock([], Calls(self._after_step, self._after_skipped_step, self._stop_all))
        self._capture = inert_capture()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._is_over = False  # a step that was put off is not looked for in the middle of an error
        self._error = None  # the user's own exception goes first
        for metric in self.metrics.values():
            metric.flush()
            metric.take_error()
        self.close()


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
