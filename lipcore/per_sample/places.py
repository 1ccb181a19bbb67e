"""Which layer a parameter's numbers are added to."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class Places:
    """The layers of a model in its order, and the parameters of each.

    Attributes:
        layer_of: parameter -> the layer it is measured at, in the model's order.
        layers: these layers.
    """

    def __init__(self, layer_of: Mapping[str, str]) -> None:
        self.layer_of = dict(layer_of)
        self.layers = list(dict.fromkeys(layer_of.values()))
        self.number = {layer: i for i, layer in enumerate(self.layers)}
        self._of: dict[frozenset[str], tuple[tuple[str, ...], list[str], list[int]]] = {}

    def of(self, names: Collection[str]) -> tuple[tuple[str, ...], list[str], list[int]]:
        """Of the parameters among `names`: they, their layers, and the place of each among these layers."""
        key = frozenset(names)
        found = self._of.get(key)
        if found is None:
            parameters = tuple(name for name in self.layer_of if name in key)
            layers = list(dict.fromkeys(self.layer_of[name] for name in parameters))
            index = [layers.index(self.layer_of[name]) for name in parameters]
            if len(self._of) > 64:  # layers that come and go at random
                self._of.clear()
            found = self._of[key] = parameters, layers, index
        return found
