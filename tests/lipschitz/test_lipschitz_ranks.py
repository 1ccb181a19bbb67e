"""The default Monitor beside wrappers for several ranks: training is the same bits, and what cannot be measured there
is off by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lipcore import Monitor

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


ACCUMULATED = "fully_shard, accumulated"


def wrapped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    if kind == "tensor parallel":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    if kind.startswith("fully_shard"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        found: nn.Module = fully_shard(model)
        return found
    return DistributedDataParallel(model, static_graph=kind == "static graph")


def trained(rank: int, kind: str, watched: bool) -> list[torch.Tensor]:
    model = wrapped(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    monitor = Monitor(model, optimizer, window_steps=3) if watched else None
    torch.manual_seed(10 + rank)
    for _ in range(4):
        if kind == ACCUMULATED:  # the first of two micro-batches is not reduced
            model.set_requires_gradient_sync(False)  # type: ignore[operator]
            model(torch.randn(5, 8)).square().mean().backward()
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
        loss = (model(torch.randn(5, 8)) - torch.randn(5, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        window = monitor.pop_window()
        assert window is not None
        if kind == "tensor parallel":
            assert "(tensor parallel), of which a rank has a part" in window.off["lipschitz"]
        else:
            ((_, values),) = window["lipschitz"].local_lipschitz.items()
            assert values.mean.valid
            assert values.mean.label == "exact"
        monitor.close()
    return [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in model.parameters()]


def work(rank: int, folder: str, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain, watched = trained(rank, kind, False), trained(rank, kind, True)
    same = all(map(torch.equal, plain, watched))
    off = [str(one.message) for one in said if "turned local_lipschitz off" in str(one.message)]
    told = len(off) == 1 and "are sharded over ranks" in off[0] if kind == "tensor parallel" else not off
    Path(folder, str(rank)).write_text(f"{same} {told}")
    dist.destroy_process_group()


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["plain", "static graph", "fully_shard", ACCUMULATED, "tensor parallel"])
def test_training_is_the_same_bits(kind: str, tmp_path: Path) -> None:
    run_ranks(work, str(tmp_path), kind)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["True True"] * 2
