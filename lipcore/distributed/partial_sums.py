"""Numbers that several ranks hold addends of, added up among these ranks alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Partial:
    """An addend.

    Attributes:
        number: this rank's, float64.
        handle: the process group of the ranks that have the others, what collectives take as `group`.
        take: gets the sum, and this rank's addend, on the CPU.
    """

    number: Tensor
    handle: Any
    take: Callable[[Tensor, Tensor], None]
