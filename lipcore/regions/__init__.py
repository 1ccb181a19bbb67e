"""Linear regions of piecewise linear networks: activation patterns, how many there are, how they change, and what those
of the training points say about other inputs (Theorem 2 of Loukas, Poiitis and Jegelka, NeurIPS 2021)."""

from lipcore.regions.coverage import Coverage
from lipcore.regions.coverage_result import CoverageResult
from lipcore.regions.patterns import Patterns, activation_patterns
from lipcore.regions.plane import Plane
from lipcore.regions.slices import SliceMap, slice_map

__all__ = [
    "Coverage",
    "CoverageResult",
    "Patterns",
    "Plane",
    "SliceMap",
    "activation_patterns",
    "slice_map",
]
