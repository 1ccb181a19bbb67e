"""The probes' part of a window: one that fails does not take the others, or the metrics, with it."""

from __future__ import annotations

from dataclasses import replace

from lipcore.distribution import Distribution
from lipcore.probes import Probe, Probes
from lipcore.results import MetricResult, Value


def measure_probes(probes: Probes) -> tuple[MetricResult, dict[str, Exception]]:
    """All probes, measured now, and the errors of those that could not be: their numbers are not valid and say why."""
    result, errors = MetricResult("probes", points={}), {}
    for name, probe in probes._probes.items():
        result.details["points"][name] = len(probe.x)
        try:
            probe.add_to(result)
        except Exception as error:
            errors[name] = error
            _add_unknown(result, probe, f"not measured: {error}")
    return result, errors


def _add_unknown(result: MetricResult, probe: Probe, note: str) -> None:
    """What :meth:`Probe.add_to` would have added, without numbers."""
    unknown = {reducer: replace(value, note=note) for reducer, value in Distribution().reduced("exact").items()}
    result.add("local_lipschitz", probe.name, "total", **unknown)
    for quantity in ("regions", "region_churn") if probe._regions else ():
        result.add(quantity, probe.name, "total", last=Value(float("nan"), 0, "exact", False, note))
