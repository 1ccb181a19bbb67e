"""Which layer a parameter's numbers are added to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lipcore.capture.layers.tapped import TappedLayers
from lipcore.functional.ordered_sums import sum_by_index, sum_of_runs
from lipcore.models.device_index import DeviceIndices
from lipcore.models.names import unwrap

_MOST = 64  # of what is kept: layers may come and go at random


class LayerIndex:
    """The layers of a model in its order, and the parameters of each.

    Attributes:
        layer_of: parameter -> the layer it is measured at, in the model's order.
        layers: these layers.
        tied: second names of parameters and layers that are tied -> the name that their numbers are found under.
    """

    def __init__(self, layer_of: Mapping[str, str], tied: Mapping[str, str] | None = None) -> None:
        self.layer_of, self.tied = dict(layer_of), dict(tied or {})
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


def tied_names(model: nn.Module | None, layer_of: Mapping[str, str]) -> dict[str, str]:
    """Return the further names of tied parameters, and of the layers they belong to there, with the name that the
    numbers of each are found under."""
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in () if model is None else unwrap(model).named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if name != canonical and canonical in layer_of:
            found[name] = canonical
            found.setdefault(name.rpartition(".")[0], layer_of[canonical])
    return found


def layers_of_parameters(layers: TappedLayers) -> dict[str, str]:
    """Return the layer of each measured parameter: the tapped one, or the module that has it where the graph measures
    it."""
    found: dict[str, str] = {}
    for site in layers.sites:
        for parameter in site.names.values():
            found.setdefault(parameter, site.name)
    owners = {name.rpartition(".")[0] for name, _ in layers.coverage.parameters()}
    root = "(root)" if "model" in owners else "model"  # a child of this name has its own place
    for parameter in layers.coverage.by_graph:
        found.setdefault(parameter, parameter.rpartition(".")[0] or root)
    return found
