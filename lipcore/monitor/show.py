"""A Monitor as people read it."""

from __future__ import annotations

from typing import Any

from lipcore.metric.show import LINES, Shown, shortened


def shown(monitor: Any) -> Shown:
    """Return its steps, which metrics are off and why, and the totals of the last closed window. Measures nothing."""
    model, windows = type(monitor.model).__name__, monitor.history
    state = "closed" if monitor._closed else "watching"
    if monitor._failures.all_stopped:
        state = "stopped by an error"
    out = Shown(
        f"Monitor of {model} ({state}): {monitor._windows.step} steps, {len(windows)} windows; {monitor._windows.rule}"
    )
    for name, metric in monitor.metrics.items():
        out.rows.append((name, "off" if metric.off else "on", metric.off))
    if monitor.alarms is not None:
        light = monitor.alarms.light
        lit = f"warning light on since step {light.since}" if light.is_on else ""
        out.rows.append(("alarms", f"{len(monitor.alarms.events)} told", lit))
    if windows:
        last = windows[-1]._shown()
        out.rows.append((last.title, "", ""))
        out.rows += shortened(((f"  {name}", *rest) for name, *rest in last.rows), LINES - 2 - len(out.rows))
    return out
