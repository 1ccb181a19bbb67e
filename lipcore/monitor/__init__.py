"""The Monitor: metrics on one model, the plan of what they cost, and fixed points measured at every window's close."""

from lipcore.monitor.fixed_points import Probe
from lipcore.monitor.monitor import Monitor
from lipcore.monitor.plan import Plan

__all__ = ["Monitor", "Plan", "Probe"]
