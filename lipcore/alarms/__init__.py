"""Alarms on single steps of training: a loss, an update or a gradient that is not as usual, and where."""

from lipcore.alarms.alarms import Alarms
from lipcore.alarms.event import AlarmEvent, AlarmStop
from lipcore.alarms.snapshot import Snapshot

__all__ = ["AlarmEvent", "AlarmStop", "Alarms", "Snapshot"]
