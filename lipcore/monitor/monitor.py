"""The Monitor: metrics on one model, the clock that drives them, and the windows their results come in."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.capture.parameters import GradientWatch, LoadWatch
from lipcore.capture.taps.tap import Record
from lipcore.capture.taps.tap_capture import Capture
from lipcore.lipschitz.metric import Lipschitz
from lipcore.metric.clock import Calls, Clock, ScaledSteps
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.protocol import Metric
from lipcore.metric.results import History, MetricResult, Window
from lipcore.monitor.fixed_points import Probe, Probes
from lipcore.monitor.plan import Plan
from lipcore.monitor.state import checked_starts
from lipcore.trajectory import Trajectory


class Monitor:
    """Watches a model while it trains: hooks only, the model and the loop stay as they are.

    The clock is the optimizer's step. Every step the metrics observe; a window of `window_steps` steps then closes by
    itself, or by :meth:`close_window`. Nothing is raised inside your forward or backward pass: an error stops the
    recording, warns, and is raised by the next call of a method of this class or at the end of the with block. So does
    a warning that your filters make an error of.

    Args:
        model: the module your loop calls (pass torch.compile's or DDP's result when there is one), or a dict of modules
            when nothing is wanted of their outputs.
        optimizer: one, or several that step in turn; a step is over when all have. Without: call :meth:`step` after
            every step.
        metrics: default [Trajectory(), Lipschitz()], the latter only where the output has one value per sample.
        window_steps: steps in a window; None: it is closed only by close_window().
        window_blocks: with more than one, windows slide: every window_steps / window_blocks steps one closes that
            covers the last window_steps steps (fewer at the start).
        scaler: a torch.amp.GradScaler whose scale is to be taken out of gradient norms.
        history_limit: how many closed windows are kept.

    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Monitor(model, optimizer, window_steps=2) as monitor:
    ...     for _ in range(4):
    ...         loss = model(torch.ones(5, 3)).square().mean()
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    >>> [window.steps for window in monitor.history]
    [2, 2]
    """

    _version = 2

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        metrics: Iterable[Metric] | None = None,
        *,
        window_steps: int | None = None,
        window_blocks: int = 1,
        history_limit: int = 1000,
        scaler: Any = None,
    ) -> None:
        parts = isinstance(model, Mapping)
        if isinstance(model, Mapping) and all(isinstance(part, nn.Module) for part in model.values()):
            model = nn.ModuleDict(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for name, number in (
            *(("window_steps", window_steps), ("window_blocks", window_blocks), ("history_limit", history_limit)),
        ):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {number!r}")
        if not (metrics is None or isinstance(metrics, Iterable)) or isinstance(metrics, type):
            raise TypeError(f"metrics: expected a list of lipcore metrics, got {metrics!r}")
        if window_blocks > 1 and (window_steps is None or window_steps % window_blocks):
            raise ValueError(f"window_blocks: {window_blocks} blocks of equal length do not make {window_steps} steps")
        default: list[Metric] = [Trajectory()] if parts else [Trajectory(), Lipschitz(optional=True)]
        chosen = default if metrics is None else list(metrics)
        self.metrics = _by_name(chosen)
        for metric in chosen if window_blocks > 1 else ():
            if type(metric).advance is Metric.advance:
                raise ValueError(f"window_blocks: {metric.name} has no sliding windows")
        self.model = model
        self.window_steps = window_steps
        self.history = History(maxlen=history_limit)
        self._unread: deque[Window] = deque(maxlen=history_limit)
        self._step = 0
        self._steps_here = 0  # since this object was made; _step goes on from a loaded state
        self._window_blocks = window_blocks
        self._starts: deque[tuple[int, int]] = deque([(0, 0)], maxlen=window_blocks)  # step, unrecorded of each block
        self._skipped = 0
        self._windows = 0
        self._closed = False
        self._final: Window | None = None  # the open window when the Monitor was closed
        self._probes = Probes()
        self._error: Exception | None = None
        self._failed = False
        self._optimizers = _optimizers(optimizer)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        for metric in chosen:
            metric.prepare(self._optimizers, scaler, window_blocks)
            metric.bind(model)
        self._tapping = [metric for metric in chosen if metric.taps()]
        if parts and self._tapping:
            raise ValueError(
                f"model: {self._tapping[0].name} watches the forward pass of one module, not of a dict of them; pass "
                "the module your loop calls"
            )
        self._find_step_calls()
        taps = [tap for metric in self._tapping for tap in metric.taps().items()]
        self._capture = Capture(model, taps, self._observe_record, self._stop)
        self._layer_captures: list[LayerCapture] = []
        try:
            self._tap_layers(chosen, parts)
            self._attach()
        except Exception:
            for capture in self._layer_captures:
                capture.close()  # nobody else could, and their metrics would stay taken
            raise
        self._watch()

    def _attach(self) -> None:
        try:
            # The shortcut is for the one metric that can do with two bias gradients.
            self._capture.attach(self._tapping[0].single_sample if len(self._tapping) == 1 else None)
        except ValueError as error:
            self._capture.close()
            if not self._turn_off(error):
                raise

    def _tap_layers(self, metrics: list[Metric], parts: bool) -> None:
        """One capture of all layers for each metric that wants them tapped."""
        for metric in metrics:
            options = metric.layer_options
            if options is None:
                continue
            if parts:
                raise ValueError(
                    f"model: {metric.name} watches the forward pass of one module, not of a dict of them; pass the "
                    "module your loop calls"
                )
            observe = functools.partial(self._observe_layers, metric)
            capture = LayerCapture(self.model, observe, self._stop_all, metric.observe_unrecorded, **options)
            metric.tapped(capture)
            capture.attach()
            self._layer_captures.append(capture)

    def _watch(self) -> None:
        """Hooks on optimizers and parameters, as the metrics want them."""
        metrics = self.metrics.values()
        calls = Calls(self._after_step, self._after_skipped_step, self._stop_all)
        if any(metric.wants_before_step for metric in metrics):
            calls.before = self._before_step
        if any(metric.wants_used_gradients for metric in metrics):
            calls.uses = self._before_step_of
        if any(metric.wants_each_step for metric in metrics):
            calls.each = self._after_step_of
        self._clock = Clock(self._optimizers, calls)
        self._load_watch = LoadWatch(self.model, self._loaded)
        self._scaled = None
        if self._scaler is not None and self._optimizers:
            self._scaled = ScaledSteps(self._scaler, self._optimizers, self._clock, self._after_skipped_step)
        self._watch_gradients()

    def _watch_gradients(self) -> None:
        wanted = self._scaled is not None or any(metric.wants_gradients for metric in self.metrics.values())
        self._gradient_watch = GradientWatch(self.model.parameters() if wanted else (), self._after_backward)

    def _unwatch(self) -> None:
        for watch in (self._clock, self._load_watch, self._gradient_watch):
            watch.close()

    def _find_step_calls(self) -> None:
        stepping = [m for m in self.metrics.values() if type(m).observe_step is not Metric.observe_step]
        self._step_calls = [(metric.step_call, metric.settle) for metric in stepping]

    # ---- errors: kept inside hooks, raised by the user's next call

    def _turn_off(self, error: Exception) -> bool:
        """Whether all that needs the hooks can do without them."""
        optional = isinstance(error, ValueError) and all(metric.optional for metric in self._tapping)
        for metric in self._tapping if optional else ():
            metric.off = str(error)
        return optional

    def _stop(self, error: Exception) -> None:
        if not self._turn_off(error):
            self._stop_all(error)

    def _stop_all(self, error: Exception) -> None:
        self._failed = True
        self._error = error
        warn_in_hook(f"lipcore stopped recording: {error}", RuntimeWarning, stacklevel=4)

    def _warn(self, message: str) -> None:
        """The recording goes on; a warning that is to be an error is kept like one."""
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
        for metric in self._tapping:
            metric.observe_record(record)

    def _observe_layers(self, metric: Metric, record: Any) -> None:
        if self._scaled is not None:
            self._scaled.look()  # whether the step before this backward pass was skipped
        metric.observe_layers(record)

    def _before_step(self) -> None:
        self._call(lambda metric: metric.before_step() if metric.wants_before_step else None)

    def _before_step_of(self, optimizer: Optimizer) -> None:
        self._call(lambda metric: metric.observe_used_gradients(optimizer) if metric.wants_used_gradients else None)

    def _after_step_of(self, optimizer: Optimizer) -> None:
        self._call(lambda metric: metric.after_step_of(optimizer) if metric.wants_each_step else None)

    def _after_backward(self) -> None:
        if self._scaled is not None:
            self._scaled.look()
        self._call(lambda metric: metric.observe_gradients() if metric.wants_gradients else None)

    def _loaded(self) -> None:
        self._call(lambda metric: metric.rebase())
        self._gradient_watch.close()  # load_state_dict(assign=True) makes new parameters
        self._watch_gradients()

    def _call(self, call: Callable[[Metric], None]) -> None:
        """From a hook, in which nothing may be raised."""
        if self._failed:
            return
        try:
            for metric in self.metrics.values():
                call(metric)
        except Exception as error:
            self._stop_all(error)

    def _after_skipped_step(self) -> None:
        self._skipped += 1
        if self._scaled is not None:
            self._scaled.ticked = True
        self._capture.tick()
        self._call(lambda metric: metric.observe_skipped_step())

    def _after_step(self) -> None:
        if self._scaled is not None:
            self._scaled.ticked = True
        if self._failed:
            return
        if self._capture.pending:
            self._capture.tick()
        for capture in self._layer_captures:
            capture.flush()
        try:
            for call, settle in self._step_calls:
                if call():
                    settle()
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
        if self._capture.refused:
            names = " and ".join(metric.name for metric in self._tapping)
            self._warn(f"lipcore has recorded no sample for {names} so far: {'; '.join(self._capture.refused)}")
            return
        self._capture.fail(
            ValueError(
                "model: two optimizer steps were made, but no backward pass came through its hooks. Call the very "
                "object that was passed as model, in grad mode; attach the Monitor to torch.compile's result, before "
                "its first call (or torch._dynamo.reset()); name input= and output= when the model's own first layer "
                "and output are not used"
            )
        )
        for metric in self._tapping:
            if metric.off:
                self._warn(f"lipcore turned {metric.name} off: {metric.off}")

    @property
    def _block_steps(self) -> int:
        return self._step - self._starts[-1][0]

    def step(self) -> None:
        """Tick the clock by hand, after the parameters were updated; for loops without an optimizer object."""
        self._raise_error()
        self._after_step()
        self._raise_error()

    def flush(self) -> None:
        """Take in backward passes that are complete but have not been followed by a step yet."""
        self._raise_error()
        if self._scaled is not None and not self._closed:
            self._scaled.look()
        self._capture.flush()
        for capture in self._layer_captures:
            capture.flush()
        self._raise_error()

    # ---- windows

    def plan(self) -> Plan:
        """What is measured, by which rule, for how many bytes."""
        return Plan({name: metric.plan() for name, metric in self.metrics.items()}, self._window_rule, str(self._clock))

    @property
    def _window_rule(self) -> str:
        if self.window_steps is None:
            return "window open since the start"
        every = self.window_steps // self._window_blocks
        of = f" of the last {self.window_steps} steps" if self._window_blocks > 1 else ""
        return f"window{of} closed every {every} steps"

    def compute(self) -> Window:
        """The open window so far; closes and resets nothing. After close(): as it was then."""
        self.flush()
        return self._final or self._window()

    def close_window(self) -> Window:
        """Close the open window now (the end of an epoch, say), append it to the history and start the next one."""
        self.flush()
        window = self._close()
        self._unread.remove(window)
        return window

    def pop_window(self) -> Window | None:
        """The oldest window that closed by itself and was not popped yet; None when there is none."""
        self._raise_error()
        return self._unread.popleft() if self._unread else None

    def _close(self) -> Window:
        window = self._final or self._window()
        self._final = None
        window = replace(window, closed=True, results=window.results | self._measure_probes())
        self.history.append(window)
        self._unread.append(window)
        self._windows += 1
        self._starts.append((self._step, self._capture.unrecorded))
        for metric in self.metrics.values():
            metric.advance() if self._window_blocks > 1 else metric.reset()
        return window

    def _measure_probes(self) -> dict[str, MetricResult]:
        if not self._probes:
            return {}
        result, errors = self._probes.finalize()
        for name, error in errors.items():
            self._warn(f"lipcore could not measure the probe {name!r}: {error}")
        return {"probes": result}

    def probe(
        self,
        x: Tensor,
        name: str,
        *,
        output: int | Callable[[Any], Tensor] | None = None,
        regions: bool = False,
        batch_size: int = 1024,
    ) -> Probe:
        """Measure the exact local Lipschitz constants at fixed points at every window's close: held-out inputs, inputs
        off the data's manifold, any.

        They come as ``window["probes"].local_lipschitz[name]`` (mean, min, max, p50, p99), a curve beside that of the
        training samples. The model is run in eval mode for it, forward and backward once per window; no parameter's
        gradient is touched. Where training diverged, constants that are not finite are left out of the numbers and the
        regions are NaN. A probe that cannot be measured any more is warned of, its numbers are not valid and their note
        says why; the run goes on.

        Args:
            x: [N, ...] on the model's device, finite; a copy is kept.
            name: where the numbers stand.
            output: as in :func:`lipcore.local_lipschitz`.
            regions: also count the linear regions that hold the points, and the share of points whose region is another
                one than at the last close (ReLU-family activations only).
            batch_size: points per forward pass.

        Returns:
            the probe: its ``values`` are the constants of every point as last measured, at first those of now.

        Raises:
            ValueError: the name is taken; what :func:`lipcore.local_lipschitz` and, with regions, activation_patterns
                refuse.
            TypeError: x is not a floating tensor; the Monitor watches a dict of modules.

        >>> model = nn.Linear(3, 1)
        >>> monitor = Monitor(model)
        >>> probe = monitor.probe(10 * torch.ones(4, 3), "far")
        >>> monitor.step(); monitor.close_window()["probes"].local_lipschitz["far"].mean.count
        4
        """
        if isinstance(self.model, nn.ModuleDict):
            raise TypeError("model: probe() needs a module that can be called, not a dict of modules")
        self._probes.check_name(name)
        probe = Probe(self.model, x, name, output, regions, batch_size)
        self._probes.add(probe)
        return probe

    def rebind(self) -> None:
        """Look at the model anew after parameters were added, removed, resized, frozen, unfrozen, or changed dtype or
        device: the open window is closed, statistics of parameters that stayed the same go on, others start now."""
        self._error, self._failed = None, False
        if self._block_steps:
            with warnings.catch_warnings():  # of parameters that are not watched: this is what is done about them
                warnings.simplefilter("ignore", UserWarning)
                self._close()
        for metric in self.metrics.values():
            metric.rebind()
        self._find_step_calls()
        if not self._closed:
            self._unwatch()  # there may be other parameters, and the metrics may want other things
            self._watch()

    def _window(self) -> Window:
        """The open window as it is now."""
        results = {name: metric.finalize() for name, metric in self.metrics.items() if not metric.off}
        start, unrecorded_before = self._starts[0]
        unrecorded = max(0, self._capture.unrecorded - unrecorded_before)
        if self._skipped and "trajectory" in results:
            results["trajectory"].details["skipped_steps"] = self._skipped
        for metric in self._tapping:
            if not metric.off:
                results[metric.name].details["unrecorded_forwards"] = unrecorded
                if self._capture.refused:
                    results[metric.name].details["unrecorded_because"] = self._capture.refused
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        local = distributed and torch.distributed.get_world_size() > 1
        return Window(self._windows, start + 1, self._step, False, local, results)

    # ---- state and end

    def state_dict(self) -> dict[str, Any]:
        """Clock and metrics; closed windows are results, not state."""
        metrics = {name: metric.state_dict() for name, metric in self.metrics.items()}
        return {
            "version": self._version,
            "step": self._step,
            "starts": [list(start) for start in self._starts],
            "windows": self._windows,
            "metrics": metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of a Monitor with the same metrics on the same model; ValueError naming the first key
        that does not fit, and nothing changed, otherwise."""
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

    def close(self) -> None:
        """Remove every hook and raise an error that was kept; results stay readable."""
        if not self._closed:
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
                self._final = self._window()  # results refer to parameters, which may go on moving
        self._raise_error()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._error = None  # the user's own exception goes first
        for metric in self.metrics.values():
            metric.flush()
            metric.take_error()
        self.close()


def _by_name(metrics: list[Metric]) -> dict[str, Metric]:
    named: dict[str, Metric] = {}
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise TypeError(f"metrics: expected lipcore metrics, got {type(metric).__name__}")
        if metric.name in named:
            raise ValueError(f"metrics: two of them are called {metric.name!r}")
        named[metric.name] = metric
    return named


def _optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    given = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for one in given:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer (or a sequence of them), got {type(one).__name__}"
            )
    return given
