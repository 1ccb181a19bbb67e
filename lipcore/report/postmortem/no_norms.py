"""Reasons why the flight recorder has no gradient norms of a step's samples."""

from __future__ import annotations

from lipcore.report.alarms_told import SAMPLES
from lipcore.report.source import Source

_METRIC = "per_sample_grad_norm"
_ADD = "add lipcore.PerSampleGradNorms(loss_reduction=...) to metrics"
_ALARMS = "with Alarms(per_sample=) it measures in the steps after an alarm alone; without it, in every step"


def why_no_norms(run: Source, step: int, first: int, last: int) -> str:
    """Return why there are none of a step: there is no such metric, it was off or at rest, or the step was not
    recorded.

    Args:
        first, last: steps around.
    """
    batches = run.batches(first, last)
    if any(one.step == step and one.norms is not None for one in batches):
        return ""
    has_metric, off = False, ""
    for window in run.each_window():
        has_metric |= _METRIC in window.results or _METRIC in window.off
        if window.first_step <= step:
            off = window.off.get(_METRIC, off if window.last_step >= step else "")
    if off:
        return f"lipcore.PerSampleGradNorms was off: {off}"
    if any(one.norms is not None and one.step < step for one in batches):
        said = "lipcore.PerSampleGradNorms has none of this step"
        if any(one.norms is not None and one.step > step for one in batches):
            return f"{said}: its backward pass was not recorded, as where a loss or a gradient is not finite"
        return f"{said}, and none later: it was turned off by then, which a warning of lipcore told, or the step failed"
    if any(event.kind == SAMPLES for event in run.events):
        return f"lipcore.PerSampleGradNorms was at rest in this step: {_ALARMS}"
    if has_metric:
        return f"lipcore.PerSampleGradNorms has measured none of the steps around: it was at rest ({_ALARMS}), or off"
    return _ADD
