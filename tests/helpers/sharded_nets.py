"""A model for tests of fully_shard()."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return found


def sharded(model: Any, **settings: Any) -> Any:
    """Shard a model and those of its children that have parameters, over the one rank that there is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in (*(m for m in model.children() if list(m.parameters())), model):
        fully_shard(module, mesh=mesh, **settings)
    return model
