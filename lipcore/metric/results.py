"""What metrics return: values that say what they are worth, and windows of them."""

from lipcore.metric.columns import Column, Columns, Places
from lipcore.metric.history import HISTORY_BYTES, History
from lipcore.metric.later import Details, Later
from lipcore.metric.metric_result import MetricResult
from lipcore.metric.quantity import Quantity, Reduced
from lipcore.metric.values import Label, Level, Value, json_ready, suffix_maximum, weakest
from lipcore.metric.window import Window

__all__ = [
    "HISTORY_BYTES",
    "Column",
    "Columns",
    "Details",
    "History",
    "Label",
    "Later",
    "Level",
    "MetricResult",
    "Places",
    "Quantity",
    "Reduced",
    "Value",
    "Window",
    "json_ready",
    "suffix_maximum",
    "weakest",
]
