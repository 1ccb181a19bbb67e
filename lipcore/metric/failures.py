"""Errors in hooks, where nothing may be raised: kept until the user's next call; the metrics that they have stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.protocol import Metric

E = TypeVar("E", bound=Exception)


class Failures:
    """Keeper of the first error, and of which metrics have stopped in which window.

    Args:
        metrics: all of them, by name.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._error: Exception | None = None
        self._stopped: dict[str, int] = {}  # the number of the window in which each was stopped
        self.all_stopped = False  #: nothing is recorded any more
        self.before_raise: Callable[[Exception], None] | None = None  #: told of a kept error that is being raised
        self.holds: Callable[[Exception], bool] | None = None  #: whether a kept error is not to be raised yet
        self.at_call: Callable[[], None] | None = None  #: called in every call of the user's, before errors are raised

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy has: it records nothing, and has no error of its own."""
        nobody = dict.fromkeys(("_error", "before_raise", "holds", "at_call"))
        return self.__dict__ | nobody | {"all_stopped": True}

    def stop(self, metrics: Iterable[Metric], error: Exception, step: int, window: int) -> None:
        """Stop metrics in this step of this window, warn, and keep the error, but not where they can be done without;
        the others go on."""
        stopping = [metric for metric in metrics if not metric.off]
        for metric in stopping:
            metric.off = f"stopped recording in step {step}: {error}"
            self._stopped[metric.name] = window
            metric.observe_stop(metric.off)
        if stopping and _can_be_done_without(stopping, error):
            self.warn(f"lipcore turned {' and '.join(metric.name for metric in stopping)} off: {error}")
            return
        alone = not self._metrics and not self.all_stopped  # of a Monitor that has only what is logged
        self.all_stopped = all(metric.off for metric in self._metrics.values())
        if stopping or alone:
            self._error = self._error or error
            names = "" if self.all_stopped else f" {' and '.join(metric.name for metric in stopping)}"
            warn_in_hook(f"lipcore stopped recording{names}: {error}", RuntimeWarning, stacklevel=6)

    def turn_off(self, metrics: list[Metric], error: Exception) -> bool:
        """Turn these metrics off with one warning, if each can be done without; return whether that is so."""
        optional = _can_be_done_without(metrics, error)
        if optional and metrics:
            for metric in metrics:
                metric.off = str(error)
            self.warn(f"lipcore turned {' and '.join(metric.name for metric in metrics)} off: {error}")
        return optional

    def warn(self, message: str) -> None:
        """Warn while the recording goes on; a warning that is to be an error is kept like one."""
        error = warn_in_hook(message, RuntimeWarning, stacklevel=6)
        self._error = self._error or error

    def keep(self, error: Exception) -> None:
        """Keep an error of the user's own functions, while the recording goes on."""
        self._error = self._error or error

    def raise_kept(self) -> None:
        """Raise the error that was kept, by this object or by a metric; later calls do not raise it again."""
        if self.at_call is not None:
            self.at_call()
        own, self._error = self._error, None
        if own is not None and self.holds is not None and self.holds(own):
            own, self._error = None, own
        kept = chain([own], (metric.take_error() for metric in self._metrics.values()))
        error = next((error for error in kept if error is not None), None)
        if error is not None:
            if self.before_raise is not None:
                self.before_raise(error)
            raise error

    def drop_kept(self) -> None:
        """Forget the errors that were kept: an exception of the user's own goes first."""
        self._error = None
        for metric in self._metrics.values():
            metric.take_error()

    def drop(self, kind: type[Exception]) -> None:
        """Forget the error that was kept here, where it is of this type."""
        if isinstance(self._error, kind):
            self._error = None

    def kept(self, kind: type[E]) -> E | None:
        """Return the error that was kept here, where it is of this type; it stays."""
        return self._error if isinstance(self._error, kind) else None

    def drop_own(self) -> None:
        """Forget the error that was kept here, and go on."""
        self._error, self.all_stopped = None, False

    def stopped(self, metric: Metric) -> bool:
        """Return whether an error has stopped this metric."""
        return bool(self._stopped) and metric.name in self._stopped

    def readable(self, window: int) -> list[str]:
        """Return the metrics that this window has: those that go on, and those that were stopped in it."""
        return [name for name, metric in self._metrics.items() if not metric.off or self._stopped.get(name) == window]

    def start_again(self) -> None:
        """Let the metrics that were stopped record again, from nothing."""
        for name in self._stopped:
            self._metrics[name].off = ""
            self._metrics[name].reset()
        self._stopped.clear()


def _can_be_done_without(metrics: Iterable[Metric], error: Exception) -> bool:
    """Return whether these are metrics that nobody has asked for, and the error says that the model has no such
    numbers; or of those that only warn, whatever it says."""
    about_model = isinstance(error, ValueError)
    return all(metric.warns_only or (metric.optional and about_model) for metric in metrics)
