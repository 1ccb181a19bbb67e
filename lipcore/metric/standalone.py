"""Metrics that stand alone: one on a model of its own, driven by update(), without a Monitor."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from lipcore.metric.engine import Engine
from lipcore.metric.protocol import Metric
from lipcore.metric.results import MetricResult

Self = TypeVar("Self", bound="StandaloneMetric")


class StandaloneMetric(Metric):
    """Base of metrics that need hooks: given a model they get an engine of their own, else a Monitor drives them."""

    _engine: Engine | None = None  # its own

    def _watch(self, model: nn.Module, scaler: Any = None) -> None:
        """Put hooks on this model for this metric alone; the last thing its constructor does."""
        self._engine = Engine(model, metrics=[self], scaler=scaler, needs_steps=False)

    def _alone(self) -> Engine:
        if self._engine is None:
            kind = type(self).__name__
            raise RuntimeError(
                f"this {kind} has no model of its own: it belongs to a Monitor, which drives and closes it, or none "
                f"was passed; to use it alone call {kind}(model, ...)"
            )
        return self._engine

    def update(self) -> None:
        """Count an optimizer step; call it after every step when the metric stands alone."""
        self._alone().step()

    def compute(self) -> MetricResult:
        """Return the open window's results; changes nothing."""
        if self._engine is not None:
            self._engine.flush()
        return self.finalize()

    def close(self) -> None:
        """Remove the hooks of a metric that stands alone and raise an error that was kept; numbers stay readable."""
        self._alone().close()

    def __enter__(self: Self) -> Self:
        self._alone()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alone().__exit__(kind, error, trace)
