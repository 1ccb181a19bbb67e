"""The metrics of those who name none: one table for Monitor, watch() and the trainers' callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.capture.outputs import is_called
from lipcore.lipschitz.metric import Lipschitz
from lipcore.metric.protocol import Metric
from lipcore.models.checks import check_kind
from lipcore.trajectory.copies import bytes_of
from lipcore.trajectory.metric import Trajectory

#: Copies of the parameters are taken up to this share of model and optimizer, and always up to so many bytes.
_SHARE, _SMALL = 0.05, 64 << 20


def default_metrics(
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    output: str | None = None,
    has_calls: bool = True,
) -> list[Metric]:
    """Return a Trajectory, and Lipschitz for a model whose own calls the hooks see: no dict or list of modules, and
    none inside a compiled one. `output` is where its output has the tensor."""
    for part in model.values() if isinstance(model, Mapping) else [model]:
        check_kind(part)
    if isinstance(model, Mapping) or not has_calls or not is_called(model):
        return [_trajectory(model, optimizer)]
    return [_trajectory(model, optimizer), Lipschitz(output=output, optional=True)]


def _trajectory(
    model: nn.Module | Mapping[str, nn.Module], optimizer: Optimizer | Sequence[Optimizer] | None
) -> Trajectory:
    """Return a Trajectory with exact copies where these are small beside model and optimizer, else without copies."""
    parts = list(model.values()) if isinstance(model, Mapping) else [model]
    parameters = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters() if p.requires_grad]
    copies = sum(sum(bytes_of(p.numel(), p.dtype, blocks=1).values()) for p in parameters)
    return Trajectory(mode="exact" if copies <= _budget(parameters, optimizer) else "updates")


def _budget(parameters: Sequence[Tensor], optimizer: Optimizer | Sequence[Optimizer] | None) -> int:
    """Return the bytes of copies that a Trajectory may take."""
    size = sum(p.numel() * p.element_size() for p in parameters)
    if optimizer is None:  # updates are made from an optimizer's state, or around its step
        return 2**63
    optimizers = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    moments = max((_moments(one) for one in optimizers), default=0)
    return max(_SMALL, int(_SHARE * size * (1 + moments)))


def _moments(optimizer: Any) -> int:
    """Return how many numbers per parameter an optimizer keeps, by its settings: it may not have begun."""
    defaults = getattr(optimizer, "defaults", {})
    return 2 if "betas" in defaults else int(bool(defaults.get("momentum")))
