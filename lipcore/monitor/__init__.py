"""The Monitor and watch(): metrics on one model, what they cost, fixed points, and the record of a run."""

from lipcore.monitor.fixed_points import Probe
from lipcore.monitor.monitor import Monitor
from lipcore.monitor.plan import Plan
from lipcore.monitor.watch import watch

__all__ = ["Monitor", "Plan", "Probe", "watch"]
