"""Layers of which it is known that they compute W x + b: torch's own, as torch runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lipcore import _core
from lipcore.models.chains import foreign_hooks, is_of_sharding
from lipcore.models.names import class_before_sharding

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Before each forward pass these put the layer's weight into an attribute, and do nothing else.
_SET_WEIGHT = (WeightNorm.__call__, SpectralNorm.__call__, prune.BasePruningMethod.__call__)


def own_class(module: nn.Module, *, sharded: bool = False) -> type[nn.Module]:
    """Return the class that computes: that under a parametrization, and under that of fully_shard()."""
    kind = class_before_sharding(module) if sharded else type(module)
    return kind.__bases__[0] if "parametrizations" in module._modules else kind


def is_affine(module: nn.Module, *, sharded: bool = False) -> bool:
    """Return whether it is a Linear or convolution of torch's own class, fully_shard()ed or not where that is asked,
    and nothing changes what it takes in, computes or gives back: no forward of its own, no hook of others. Asked at
    every pass."""
    own = module.__dict__
    if own_class(module, sharded=sharded) not in _AFFINE or "forward" in own or "_conv_forward" in own:
        return False
    # Looked up in __dict__: this runs in every pass.
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if not (own["_forward_pre_hooks"] or own["_forward_hooks"]):
        return True
    return all(_sets_weight(hook) or (sharded and is_of_sharding(hook)) for hook in foreign_hooks(module))


def _sets_weight(hook: Any) -> bool:
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return isinstance(hook, kinds) and type(hook).__call__ in _SET_WEIGHT


def is_parametrized(module: nn.Module) -> bool:
    """Return whether the layer's weight is computed whenever it is read."""
    return "parametrizations" in module._modules and parametrize.is_parametrized(module, "weight")


class WeightInUse:
    """A layer's weight as its forward pass used it, without computing it again: a parametrization may draw random
    numbers, or iterate, whenever its weight is read."""

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._caught: Tensor | None = None
        self._list: Any = None  # of the weight's parametrizations
        self._handle: Any = None

    def watch(self, module: nn.Module) -> None:
        """Follow this layer, and a parametrization that it has by now."""
        found: Any = module.parametrizations["weight"] if is_parametrized(module) else None  # type: ignore[index]
        if module is self._module and found is self._list and (self._handle is None) == (found is None):
            return
        self.close()
        self._module, self._list, self._caught = module, found, None
        if found is not None:
            self._handle = found.register_forward_hook(self._computed)

    def close(self) -> None:
        """Remove the hook; what was seen last stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _computed(self, module: nn.Module, arguments: Any, weight: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _core.is_plain_run():
            return
        self._caught = weight.detach() if isinstance(weight, Tensor) else None

    def __call__(self) -> Tensor | None:
        """Return it; None where it is not known."""
        if self._module is None:
            return None
        weight = self._module._parameters.get("weight")
        if weight is None and is_parametrized(self._module):
            return self._caught
        # weight_norm, spectral_norm and pruning of the old kind leave what they computed in an attribute.
        weight = vars(self._module).get("weight") if weight is None else weight
        return weight if isinstance(weight, Tensor) else None

    def __reduce__(self) -> tuple[type[WeightInUse], tuple[()]]:
        return WeightInUse, ()
