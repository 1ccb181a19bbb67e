"""What a pass of lipcore's own may change beside gradients, and has back when it ends: one way for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from lipcore.models.held import Held
from lipcore.models.module_state import ModuleState
from lipcore.models.random_numbers import RandomNumbers
from lipcore.models.writes import writes_put_back


class RandomPass(ValueError):
    """Warning that the model drew random numbers: what was measured is one draw of many."""


class PassState:
    """State that a forward pass begins with: buffers, attributes of modules and of what they hold, random numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.held = Held(model)
        self._modules, self.random = ModuleState(self.held), RandomNumbers(self.held)

    def put_back(self) -> bool:
        """Make everything what it was then; return whether random numbers had been drawn."""
        self._modules.put_back()
        return self.random.put_back()


@contextmanager
def all_put_back(model: nn.Module, *, random: bool = False, writes: bool = True) -> Iterator[None]:
    """Put back whatever a pass of lipcore's own changes: parameters that it writes into, buffers, attributes of modules
    and of what they hold, and generators of random numbers.

    Args:
        model: that is run.
        random: it may draw random numbers.
        writes: it may write into parameters; a backward pass in which no forward pass runs again does not, and is
            spared the cost of looking.

    Raises:
        RandomPass: it did, and may not.
    """
    state, used = PassState(model), False
    try:
        with writes_put_back(state.held.watched()) if writes else nullcontext():
            yield
    finally:
        used = state.put_back()
    if used and not random:
        raise RandomPass(
            "model: its forward pass draws random numbers, so its output is random; call model.eval(), or leave the "
            "noise out"
        )


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """Keep autocast from keeping weights that it casts here for the training's next forward pass: they may have no
    graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
