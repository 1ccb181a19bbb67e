"""Models whose modules run one after the other."""

from __future__ import annotations

from torch import nn

from lipcore.names import unwrap


def modules_in_order(model: nn.Module) -> list[nn.Module] | None:
    """Of nested nn.Sequentials of torch's own layers; None where there is other wiring."""
    model = unwrap(model)
    if type(model) is nn.Sequential:
        parts = [modules_in_order(child) for child in model]
        return None if any(part is None for part in parts) else [m for part in parts for m in part or ()]
    known = type(model).__module__.startswith("torch.nn.modules") and not list(model.children())
    return [model] if known else None
