"""One forward pass as the layer taps see it: what has come back from its backward pass, and the record made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipcore.layers import Batch, Factor

#: Rows that are no parameter's: the gradient at a layer's output ("delta/<layer>") and at the model's.
DELTA = "delta/"
OUTPUT = "output/"


@dataclass
class LayerRecord:
    """What one backward pass brought, before the loss reduction is taken out."""

    samples: int  #: B
    norms_sq: dict[str, Tensor]  #: per parameter, float64 [B]: squared norm of the backpropagated per-sample gradient
    reasons: dict[str, str] = field(default_factory=dict)  #: why a parameter is not among them
    broken: str = ""  #: why not even the total is known


class LayerPass:
    """A forward pass in grad mode, from its beginning until its backward pass has ended.

    Each call of a layer brings factors of the per-sample gradients of its parameters. They become norms at once, but
    where a parameter is used again in this pass: then they wait until the backward pass ends, and are joined first.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.calls: Counter[str] = Counter()  # uses of each parameter, as far as modules' calls show them
        self.probes: dict[int, Tensor] = {}  # by number of the site, for compiled regions
        self.single = False  # a batch of one, served from the gradients
        self.alone = False  # ... and when its backward pass began there were no others in them
        self.task = -1  # the backward pass that the rows came from
        self.finished_task = -1
        self.broken = ""
        self._rows: dict[str, Tensor] = {}
        self._held: dict[str, Factor] = {}
        self._reasons: dict[str, str] = {}

    def begin_task(self, task: int) -> bool:
        """A number comes back in this backward pass; True when it is the first."""
        if self.task == task:
            return False
        self.task = task
        self._rows.clear()  # left by a backward pass that broke off
        self._held.clear()
        self._reasons.clear()
        return True

    def add_factor(self, name: str, factor: Factor) -> None:
        if self.calls[name] > 1:
            held = self._held.get(name)
            self._held[name] = factor if held is None else held.join(factor)
        else:
            self.add_row(name, factor.norms_sq())

    def add_row(self, name: str, norms_sq: Tensor) -> None:
        if name in self._rows and not name.startswith((DELTA, OUTPUT)):
            self.broken = (
                f"parameter '{name}' was used again in a part of the forward pass that could not be followed, so the "
                "squares cannot be joined"
            )
        self._rows[name] = norms_sq

    def refuse(self, name: str, reason: str) -> None:
        self._reasons[name] = reason

    def record(self) -> LayerRecord:
        """Everything that came back, and why the rest did not."""
        with torch.no_grad():
            for name, factor in self._held.items():
                self._rows[name] = factor.norms_sq()
        self._held.clear()
        rows = {name: row for name, row in self._rows.items() if name not in self._reasons}
        for name in self.calls:
            if name not in rows:
                self._reasons.setdefault(name, "no gradient reached it in this backward pass")
        record = LayerRecord(self.batch.size, rows, dict(self._reasons), self.broken)
        self._rows, self._reasons, self.broken = {}, {}, ""
        self.finished_task = self.task
        return record
