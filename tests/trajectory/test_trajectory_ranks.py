"""Shards of a model on several ranks against the whole model on one."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

import lipcore


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))


def train(model: nn.Module, trajectory: lipcore.Trajectory, steps: int = 12) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(8, 6, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trajectory.update()


def assert_like(found: lipcore.results.MetricResult, expected: lipcore.results.MetricResult) -> None:
    for quantity, places in expected.items():
        assert set(found[quantity]) == set(places)
        for place, reduced in places.items():
            for reducer, value in reduced.items():
                error = 0.01 if reducer in ("p50", "p99") else 1e-5
                assert found[quantity][place][reducer].value == pytest.approx(value.value, rel=error, abs=1e-12), (
                    f"{quantity}.{reducer} of {place}"
                )


def sharded(rank: int, world: int, port: int, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        whole = make()
        alone = lipcore.Trajectory(whole)
        train(whole, alone)
        model = make()
        if kind == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world,))
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
            trajectory = lipcore.Trajectory(model)
        else:
            model = nn.parallel.DistributedDataParallel(model)
            trajectory = lipcore.Trajectory(model)
        train(model, trajectory)
        assert_like(trajectory.sync(), alone.compute())
        if kind == "fsdp2":  # a shard alone is less than the whole
            local, total = trajectory.compute().path_length["total"].sum, alone.compute().path_length["total"].sum
            assert local.value < 0.999 * total.value
    finally:
        dist.destroy_process_group()


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_ranks_together_give_the_whole(kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(sharded, 2, port, kind)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="not initialised"):
        lipcore.Trajectory(make()).sync()
