"""A window's numbers as the metric's results."""

from __future__ import annotations

from collections.abc import Sequence

from lipcore.metric.distribution import Distribution
from lipcore.metric.results import Label, MetricResult, Value
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.step_sums import StepSums

TOTAL = "total"


def add_norms(
    result: MetricResult,
    layers: Sequence[str],
    distributions: Sequence[Distribution],
    estimated: Sequence[str],
    note: str,
) -> None:
    """The distributions of the norms per layer and, with the note, in total; `estimated`: layers that are no exact
    ones."""
    for layer, distribution in zip([*layers, TOTAL], distributions, strict=False):
        total = layer == TOTAL
        label: Label = "estimate" if layer in estimated or (total and estimated) else "exact"
        reduced = distribution.reduced(label, note=note if total else "")
        missing = distribution.missing + distribution.invalid
        reduced["missing"] = Value(float(missing), distribution.count + missing)
        result.add("grad_norm", layer, "total" if total else "group", **reduced)


def add_noise(result: MetricResult, layers: Sequence[str], noise: NoiseScale, sums: StepSums | None) -> None:
    """The gradient noise scale and its two estimators, and why steps were left out."""
    for layer, found in zip([*layers, TOTAL], noise.finalize(), strict=True):
        level = "total" if layer == TOTAL else "group"
        for quantity, reducers in found.items():
            result.add(quantity, layer, level, **reducers)  # type: ignore[arg-type]
    if sums is not None:
        result.details["noise_scale_skipped"] = sums.skipped()
        if sums.off:
            result.details["noise_scale_off"] = sums.off
