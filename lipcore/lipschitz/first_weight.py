"""W_1 as it is when a window closes, kept for its singular values: they are computed when somebody reads them, since
they cost seconds for a large layer and training would wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipcore.lipschitz.singular_values import SingularValues, has_singular_values, singular_values
from lipcore.metric.later import Later
from lipcore.models.affine import own_class
from lipcore.models.names import class_before_sharding


def singular_values_later(
    module: nn.Module, weight: Tensor, batch_shape: tuple[int, ...] | None, before: Tensor | None
) -> Later[SingularValues] | None:
    """Return the singular values of a first layer as it is now, to be computed from a copy when they are read; None
    where there are none.

    Args:
        weight: as the layer has used it: a parametrization is not computed again.
        batch_shape: of the layer's input.
        before: a copy of the weight that serves; None where one has to be made.
    """
    if not has_singular_values(module, weight, batch_shape):
        return None
    weight = weight.detach()
    copy = weight.clone() if before is None else before
    twin = twin_of(module, copy)

    def taken() -> SingularValues:
        try:
            found = singular_values(twin, batch_shape)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # who reads a window cannot do anything about it
            return unknown(f"singular values of W_1 could not be taken: {error}")
        assert found is not None
        return found

    return Later(taken, copy.numel() * copy.element_size(), unknown)


def unknown(why: str) -> SingularValues:
    """Return singular values that are not known, for this reason."""
    return SingularValues(math.nan, None, why, math.nan)


def twin_of(module: nn.Module, weight: Tensor) -> nn.Module:
    """Return a layer with this weight and the module's settings (stride, padding, ...), without its hooks and
    parameters."""
    kind = own_class(module)
    kind = class_before_sharding(module) if kind is type(module) else kind
    twin: nn.Module = kind.__new__(kind)
    nn.Module.__init__(twin)
    own = set(twin.__dict__) | {"weight", "forward"}
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    twin.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return twin
