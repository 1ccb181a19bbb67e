"""What every metric is made of: the protocol, results, distributions, states and the engine.

For metrics of one's own (docs/own_metric.md); provisional, so that it may still change between versions.
"""

from lipcore.capture.taps.tap import FIRST_LAYER, Record, Tap
from lipcore.metric.distribution import Distribution
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import Metric, Needs, PlanLine
from lipcore.metric.results import MetricResult, Value
from lipcore.metric.state import check_version, checked_count, checked_tensor

__all__ = [
    "FIRST_LAYER",
    "Distribution",
    "Metric",
    "MetricResult",
    "Needs",
    "PlanLine",
    "PlanLines",
    "Record",
    "Tap",
    "Value",
    "check_version",
    "checked_count",
    "checked_tensor",
]
