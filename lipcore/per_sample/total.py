"""What the place is called in which numbers of all measured parameters stand."""

from __future__ import annotations

from lipcore.capture.layers.tapped import TappedLayers

TOTAL = "total"
#: Where trained parameters are left out: no key of the whole model's number, which nobody has measured.
TOTAL_OF_MEASURED = "total_of_measured"


def total_of(capture: TappedLayers | None) -> str:
    """Return the name of that place for a model's coverage as it is now."""
    return TOTAL_OF_MEASURED if capture is not None and capture.coverage.share else TOTAL
