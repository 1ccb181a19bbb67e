"""Updates from the optimizer's own state, of parameters that are DTensors: refused where the Monitor is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lipcore import Monitor, Trajectory


@pytest.mark.usefixtures("group_of_one_rank")
@pytest.mark.parametrize("remedy", [{"mode": "updates"}, {"mode": "exact"}, {"source": "snapshot"}])
def test_it_is_refused_with_remedies_that_work(remedy: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="source: 'optimizer' is for .* '0.weight' is a DTensor .*pass mode='updates'"):
        Monitor(model, optimizer, [Trajectory(source="optimizer")])
    with Monitor(model, optimizer, [Trajectory(**remedy)], window_steps=2) as monitor:
        for _ in range(2):
            before = [p.full_tensor().clone() for p in model.parameters()]  # type: ignore[attr-defined]
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
    moved = torch.cat([(p.full_tensor() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])  # type: ignore[attr-defined]
    assert monitor.history[-1]["trajectory"].update_norm["total"].last.value == pytest.approx(
        float(moved.detach().norm())
    )
