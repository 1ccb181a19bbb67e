"""Which layer a parameter's numbers are added to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lipcore.functional.ordered_sums import sum_by_index, sum_of_runs
from lipcore.models.device_index import DeviceIndices

_MOST = 64  # of what is kept: layers may come and go at random


class LayerIndex:
    """The layers of a model in its order, and the parameters of each.

    Attributes:
        layer_of: parameter -> the layer it is measured at, in the model's order.
        layers: these layers.
    """

    def __init__(self, layer_of: Mapping[str, str]) -> None:
        self.layer_of = dict(layer_of)
        self.layers = list(dict.fromkeys(layer_of.values()))
        self.number = {layer: i for i, layer in enumerate(self.layers)}
        self._indices = DeviceIndices()
        self._of: dict[frozenset[str], tuple[tuple[str, ...], list[str], list[int]]] = {}

    def of(self, names: Collection[str]) -> tuple[tuple[str, ...], list[str], list[int]]:
        """Return the parameters among `names`, their layers, and for each parameter the index of its layer among
        these."""
        key = frozenset(names)
        found = self._of.get(key)
        if found is None:
            parameters = tuple(name for name in self.layer_of if name in key)
            layers = list(dict.fromkeys(self.layer_of[name] for name in parameters))
            index = [layers.index(self.layer_of[name]) for name in parameters]
            if len(self._of) > _MOST:
                self._of.clear()
            found = self._of[key] = parameters, layers, index
        return found

    def sums(self, rows: Tensor, index: Sequence[int], count: int) -> Tensor:
        """Return the sums of the rows, [N, ...], of every index in [0, count): in their order on every device."""
        if rows.is_cpu:
            return sum_by_index(rows, self.on(rows.device, index), count)
        order, offsets = self._indices.runs(rows.device, index, count)
        return sum_of_runs(rows if order is None else rows.index_select(0, order), offsets)

    def on(self, device: torch.device, index: Sequence[int]) -> Tensor:
        """Return an index on a device, where it is kept."""
        return self._indices.on(device, index)
