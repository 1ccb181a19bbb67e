"""The hooks on a model and on its tapped layers: put on, exchanged for those that serve batches of one, taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lipcore.capture.layers.layer_site import LayerSite


class ModelHooks:
    """The hooks of one capture: `begin` before the model's forward pass and `end` after it (also when it raised), and
    each site on its layer."""

    def __init__(self, model: nn.Module, sites: Sequence[LayerSite], begin: Any, end: Any) -> None:
        self._model, self._sites = model, sites
        self._begin, self._end = begin, end
        self._before = model.register_forward_pre_hook(begin, with_kwargs=True)
        self._on_layers: list[Any] = []
        self._hook_layers()
        self._after = model.register_forward_hook(end, always_call=True)

    def _hook_layers(self) -> None:
        # Before hooks that were there already: what they return may not be the layer's own output.
        self._on_layers = [
            site.module.register_forward_hook(site, with_kwargs=True, prepend=True) for site in self._sites
        ]

    def add(self, site: LayerSite) -> None:
        """Tap one more layer, which is among the sites already."""
        self._on_layers.append(site.module.register_forward_hook(site, with_kwargs=True, prepend=True))

    def _unhook_layers(self) -> None:
        for handle in self._on_layers:
            handle.remove()
        self._on_layers = []

    def serve(self, begin: Any, end: Any) -> None:
        """Put the hooks `begin` and `end` in the place of the model's own, in their order among others' hooks, and take
        those of the layers off."""
        self._replace(begin, end)
        self._unhook_layers()

    def tap(self) -> None:
        """Put back the hooks that :meth:`serve` has taken off."""
        self._hook_layers()  # first: another thread's pass may begin at once
        self._replace(self._begin, self._end)

    def _replace(self, begin: Any, end: Any) -> None:
        self._model._forward_pre_hooks[self._before.id] = begin
        self._model._forward_hooks[self._after.id] = end

    def remove(self) -> None:
        self._before.remove()
        self._after.remove()
        self._unhook_layers()
