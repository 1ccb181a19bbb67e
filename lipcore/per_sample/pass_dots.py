"""The inner products of one backward pass's samples with the references."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.metric.distribution import Distribution, observe_rows
from lipcore.per_sample.layer_index import LayerIndex
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.pass_norms import Norms, layer_reasons


class PassDots:
    """Inner products of one backward pass: those of its record times its loss factor.

    Args:
        record: of the pass.
        factor: its loss factor.
        layer_index: the layers of the model.
        columns: K, how many references there are.
        single: numbers are told as [B], not as [B, K].
    """

    def __init__(
        self, record: LayerRecord, factor: LossFactor, layer_index: LayerIndex, columns: int, single: bool
    ) -> None:
        self.record, self.factor = record, factor
        self._layer_index, self._single = layer_index, single
        self._names, self._layers, self._index = layer_index.of(record.norms_sq)
        if self._names:
            self._rows = torch.stack([record.norms_sq[name] for name in self._names]) * factor.value
        else:
            self._rows = torch.empty(0, columns, record.samples, dtype=torch.float64, device="cpu")

    @property
    def samples(self) -> int:
        return self.record.samples

    @cached_property
    def _places(self) -> Tensor:
        """Sums per layer that brought numbers and, last, in total, [layers + 1, K, B]."""
        rows = self._rows
        sums = self._layer_index.sums(rows, self._index, len(self._layers) + 1)
        sums[-1] = rows.sum(0) if self._names and not self.record.broken else torch.nan
        return sums

    def _told(self, numbers: Tensor) -> Tensor:
        return numbers[0] if self._single else numbers.T

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.samples,) if self._single else (self.samples, self._rows.shape[1])

    @property
    def per_sample(self) -> Tensor:
        return self._told(self._places[-1])

    @property
    def per_layer(self) -> Norms:
        rows = {layer: self._told(numbers) for layer, numbers in zip(self._layers, self._places, strict=False)}
        reasons = layer_reasons(self._layer_index, self.record, rows)
        return Norms("layer", rows, reasons, self._shape, self._layer_index.tied)

    @property
    def per_parameter(self) -> Norms:
        rows = {name: self._told(numbers) for name, numbers in zip(self._names, self._rows, strict=True)}
        return Norms("parameter", rows, self.record.reasons, self._shape, self._layer_index.tied)

    def observe(self, distributions: list[Distribution]) -> None:
        """Add the numbers per layer of the model and in total, per reference, and apart by sign: a distribution is one
        of values >= 0. A layer without numbers counts B missing ones, and a number of the other sign is missing
        too."""
        found = dict(zip(self._layers, self._places, strict=False))
        missing = torch.full_like(self._places[-1], torch.nan)
        every = [*(found.get(layer, missing) for layer in self._layer_index.layers), self._places[-1]]
        table = torch.stack(every).flatten(0, 1)
        signs = torch.stack([table, -table], 1)
        signs = signs.masked_fill(torch.stack([table < 0, table >= 0], 1), torch.nan).flatten(0, 1)
        observe_rows(signs, distributions)
