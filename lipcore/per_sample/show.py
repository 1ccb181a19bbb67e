"""Metrics of single samples' gradients as people read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lipcore.capture.layers.tapped import TappedLayers
from lipcore.metric.show import LINES, Shown, reducers_text, shortened
from lipcore.metric.values import Value


def shown(
    metric: Any,
    rows: Sequence[tuple[str, Mapping[str, Value]]],
    layers: Collection[str],
    capture: TappedLayers | None,
    reduction: str,
    doubts: Mapping[str, int],
    no_noise: Mapping[str, int],
) -> Shown:
    """Return the open window's reducers by place, the total first, and what is not measured and why; `layers`: those
    that are measured."""
    out = Shown(f"{type(metric).__name__} ({reduction}): {len(layers)} layers")
    if capture is None:
        out.rows.append(("off", "", "it watches no model yet: pass model=, or give it to a Monitor"))
        return out
    if capture.coverage.share:
        out.rows.append(("measured", "", capture.coverage.share))
    out.rows += [(name, "not covered", why) for name, why in capture.coverage.uncovered.items()]
    out.rows += [(f"{count} backward passes", "not recorded", why) for why, count in capture.unrecorded.items()]
    out.rows += [(f"{count} backward passes", "not proved", why) for why, count in doubts.items()]
    out.rows += [(f"{count} steps", "left out of the noise scale", why) for why, count in no_noise.items()]
    if rows:
        *each, total = rows
        told = [(place, *reducers_text(reducers)) for place, reducers in (total, *each)]
        out.rows = shortened(out.rows, LINES // 2) + shortened(told, LINES - 1 - min(len(out.rows), LINES // 2))
    return out
