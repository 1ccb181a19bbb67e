"""The windows of an engine: how one closes, what it is made of, who is told, and how those of all ranks meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from lipcore.capture.layers.layer_capture import LayerCapture
from lipcore.capture.taps.tap_capture import Capture
from lipcore.metric.clock import ScaledSteps
from lipcore.metric.engine_calls import EngineCalls
from lipcore.metric.global_windows import GlobalWindows
from lipcore.metric.host_reads import OnDevice, fetched
from lipcore.metric.listener import Listener
from lipcore.metric.ordinary import ordinary
from lipcore.metric.rank_part import RankPart
from lipcore.metric.results import History, MetricResult, Window
from lipcore.metric.step_end import StepEnd


class EngineWindows(EngineCalls):
    """The part of an engine that makes windows of what its metrics have, and hands them out."""

    _capture: Capture
    _layer_captures: list[LayerCapture]
    _step_end: StepEnd
    _scaled: ScaledSteps | None
    _global: GlobalWindows
    _listeners: list[Listener]
    _closed: bool

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
        if warning := self._global.keep(window, self.metrics, self._parts_at_close()):
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

    def _parts_at_close(self) -> dict[str, RankPart]:
        """Return what such results add to those of all ranks."""
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
        lacking = self._global.left_out_alone(windows.begin)
        names = [name for name in self._failures.readable(windows.number) if name not in lacking]
        with fetched(self._on_device(names)):
            for name in names:
                try:
                    results[name] = _checked_result(name, self.metrics[name].finalize())
                except Exception as error:  # noqa: PERF203
                    self._stop_metric(self.metrics[name], error)
        scope = self._global.scope(self.model, self.metrics.values())
        off = lacking | {name: metric.off for name, metric in self.metrics.items() if metric.off}
        return Window(windows.number, windows.begin + 1, windows.step, False, scope, results, off)


def _checked_result(name: str, result: Any) -> MetricResult:
    if not isinstance(result, MetricResult):
        raise TypeError(f"{name}: expected finalize() to return a MetricResult, got {type(result).__name__}")
    return result
