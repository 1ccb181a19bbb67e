"""Lipschitz constants of a model that is sharded as a whole: no module inside is, so that its forward pass goes on with
what the root has gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_rank import one_rank
from sharded_nets import Net

from lipcore import Lipschitz, Monitor


def trained(*, sharded: bool, watched: bool) -> tuple[list[torch.Tensor], float]:
    """The weights after some steps, and the largest constant seen."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = Net()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, metrics=[Lipschitz()], window_steps=None) if watched else None
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    largest = 0.0
    if monitor is not None:
        window = monitor.compute()
        assert window is not None
        constants = window["lipschitz"].local_lipschitz
        largest = max(constants[place]["max"].value for place in constants)
        monitor.close()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]
    return weights, largest


@pytest.mark.ci
def test_training_goes_on_and_the_constants_are_those_of_the_whole_model() -> None:
    with one_rank():
        plain, _ = trained(sharded=True, watched=False)
        weights, constant = trained(sharded=True, watched=True)
        _, expected = trained(sharded=False, watched=True)
    assert all(map(torch.equal, weights, plain))
    assert constant == pytest.approx(expected, rel=1e-6)
