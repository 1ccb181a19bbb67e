"""Calls of metrics out of hooks, in which nothing may be raised: errors are kept for the user's next call."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from lipcore.metric.failures import Failures
from lipcore.metric.protocol import Metric
from lipcore.metric.windows import Windows


class EngineCalls:
    """The part of an engine that calls metrics, and stops those that raise."""

    model: nn.Module
    metrics: dict[str, Metric]  #: by their names
    _failures: Failures
    _windows: Windows
    _tapping: list[Metric]  # those with taps
    _step_calls: list[tuple[Metric, Callable[[], object], Callable[[], None]]]  # and what is called where it says so

    _told_of_steps: list[Metric]  # when one is made

    def _find_step_calls(self) -> None:
        stepping = [m for m in self.metrics.values() if type(m).observe_step is not Metric.observe_step]
        self._step_calls = [(metric, metric.step_call, metric.settle) for metric in stepping]
        self._told_of_steps = [m for m in self.metrics.values() if type(m).step_made is not Metric.step_made]

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

    def _at_step_end(self, call: Callable[[], None]) -> None:
        if self._failures.all_stopped:
            return
        try:
            call()
        except Exception as error:
            self._stop_all(error)

    def _call(self, metrics: Iterable[Metric], call: Callable[[Metric], None]) -> None:
        """Call from a hook, in which nothing may be raised."""
        for metric in metrics:
            if self._failures.stopped(metric):
                continue
            try:
                call(metric)
            except Exception as error:
                self._stop_metric(metric, error)
