"""The per-sample norms of one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.layer_pass import DELTA, OUTPUT, LayerRecord


class Norms(Mapping[str, Tensor]):
    """Per name float64 [B]; NaN throughout where there is no number, with the reason in :attr:`reasons`."""

    def __init__(self, what: str, rows: dict[str, Tensor], reasons: dict[str, str], samples: int) -> None:
        self._what, self._rows, self.reasons, self._samples = what, rows, reasons, samples

    def __getitem__(self, name: str) -> Tensor:
        if name in self._rows:
            return self._rows[name]
        if name in self.reasons:
            return torch.full((self._samples,), torch.nan, dtype=torch.float64)
        known = ", ".join(repr(n) for n in list(self)[:8])
        raise KeyError(f"no {self._what} {name!r} was measured; there are {known}")

    def __iter__(self) -> Iterator[str]:
        yield from self._rows
        yield from (name for name in self.reasons if name not in self._rows)

    def __len__(self) -> int:
        return len(set(self._rows) | set(self.reasons))


class MicroBatch:
    """One record with its factor f: norms are f times the backpropagated ones."""

    def __init__(self, record: LayerRecord, factor: float | Tensor, layer_of: Mapping[str, str]) -> None:
        self.record, self.factor = record, factor
        self._layer_of = layer_of
        square = factor * factor
        self.squares = {
            name: row * square for name, row in record.norms_sq.items() if not name.startswith((DELTA, OUTPUT))
        }
        layers: dict[str, list[Tensor]] = {}
        for name, row in self.squares.items():
            layers.setdefault(layer_of[name], []).append(row)
        self.layer_squares = {layer: rows[0] if len(rows) == 1 else sum_of(rows) for layer, rows in layers.items()}
        self.total_sq = self._total()

    @property
    def samples(self) -> int:
        return self.record.samples

    def _total(self) -> Tensor:
        rows = list(self.layer_squares.values())
        if self.record.broken or not rows:
            return torch.full((self.samples,), torch.nan, dtype=torch.float64)
        return sum_of(rows)

    @property
    def per_sample(self) -> Tensor:
        return self.total_sq.sqrt()

    @property
    def per_parameter(self) -> Norms:
        rows = {name: row.sqrt() for name, row in self.squares.items()}
        return Norms("parameter", rows, self.record.reasons, self.samples)

    @property
    def per_layer(self) -> Norms:
        rows = {name: row.sqrt() for name, row in self.layer_squares.items()}
        missing = {self._layer_of[name]: why for name, why in self.record.reasons.items() if name in self._layer_of}
        return Norms("layer", rows, {name: why for name, why in missing.items() if name not in rows}, self.samples)

    @property
    def normalized(self) -> Norms:
        """r of every layer: the loss's factors cancel."""
        record: Any = self.record.norms_sq
        if OUTPUT not in record:
            raise RuntimeError("normalized: nothing was recorded; pass normalized=True and run a backward pass")
        eps_sq = record[OUTPUT]
        usable = (eps_sq > 0) & eps_sq.isfinite()
        rows = {
            name[len(DELTA) :]: torch.where(usable, row / eps_sq, torch.nan).sqrt()
            for name, row in record.items()
            if name.startswith(DELTA)
        }
        return Norms("layer", rows, {}, self.samples)


def sum_of(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).sum(0)
