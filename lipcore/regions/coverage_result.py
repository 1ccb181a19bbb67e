"""Result of a query to a Coverage."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipcore.metric.results import json_ready


@dataclass(frozen=True)
class CoverageResult:
    """Result of :meth:`Coverage.query`, one entry per input; all bounds are of the model's local Lipschitz constant
    at that input."""

    status: NDArray[np.str_]  #: "train", "combination" or "uncovered"
    k: NDArray[np.int64]  #: training regions combined: 1 for "train", 0 for "uncovered"
    #: exact for "train"; one-sided for "combination" (Theorem 2 with the constants of this moment: gamma = 0); inf for
    #: "uncovered"
    bound: NDArray[np.float64]
    #: exact for "train"; else one-sided, the best of the relaxation's candidates (see :class:`Coverage`), of which
    #: `bound` is one for "combination". Where ||M|| is not known it is `bound`, or NaN where that is none or not solved
    relaxed: NDArray[np.float64]
    #: as `relaxed`, from the one training region that gives the least; NaN where ||M|| is not known, but for "train"
    nearest: NDArray[np.float64]

    @property
    def labels(self) -> NDArray[np.str_]:
        """Labels of `bound`, `relaxed` and `nearest`, per input: "exact" where the status is "train", else
        "one-sided"."""
        return np.where(self.status == "train", "exact", "one-sided")

    def __repr__(self) -> str:
        shares = ", ".join(f"{np.mean(self.status == s):.1%} {s}" for s in ("train", "combination", "uncovered"))
        return f"CoverageResult({len(self.status)} inputs: {shares})"

    def to_dict(self) -> dict[str, Any]:
        """Return lists that are JSON-ready, `labels` among them; what is not finite becomes None."""
        found: dict[str, Any] = json_ready({field.name: getattr(self, field.name) for field in fields(self)})
        return found | {"labels": self.labels.tolist()}
