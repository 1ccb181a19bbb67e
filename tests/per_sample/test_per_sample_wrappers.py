"""Per-sample norms of wrapped models: DistributedDataParallel and fully_shard on two ranks, and on one."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Wrapper
from per_sample_models import Block, assert_equal, made, sum_loss, train, weights
from per_sample_oracle import norms_sq, samples_of
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, PerSampleGradNorms

dist = torch.distributed
NAME = "per_sample_grad_norm"
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


class Model(nn.Module):
    """Blocks between layers with an in-place activation; [B, T, 5] to [B, T, 3]."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        for block in self.blocks:
            again = self.checkpointed and x.dtype != torch.float64
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        y: Tensor = self.last(x)
        return y


def inputs(rank: int, step: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(size, 4, 5, generator=generator)


def totals(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack(list(norms_sq(model, samples_of((x,), len(x)), sum_loss).values())).sum(0).sqrt()


def local_loop(rank: int, model: nn.Module, exact: Model, size: int, options: dict[str, Any]) -> PerSampleGradNorms:
    """Some steps, against one sample at a time at the same weights; `exact` gets the weights that training has."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    twin_optimizer = torch.optim.SGD(exact.parameters(), lr=1e-3)
    metric = PerSampleGradNorms(loss_reduction="mean", **options)
    expected = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for step in range(4):
            x = inputs(rank, step, size)
            expected.append(totals(exact, x))
            train(model, optimizer, [x])
            torch.testing.assert_close(metric.per_sample, expected[-1], rtol=2e-5, atol=0)
            twin_optimizer.zero_grad()
            sum((sum_loss(exact(inputs(r, step, size))) / size / dist.get_world_size()) for r in range(2)).backward()
            twin_optimizer.step()
        result = monitor.compute()
        assert result.local
        found = result[NAME].norm["total"]
        assert found.mean.count == 4 * size
        assert found.mean.value == pytest.approx(float(torch.cat(expected).mean()), rel=2e-5)
    return metric


def check_ddp(rank: int, **settings: Any) -> None:
    for size in (3, 1):
        model = made(Model)
        local_loop(rank, DistributedDataParallel(model, **settings), copy.deepcopy(model), size, {})


def check_ddp_unchanged(rank: int) -> None:
    found = []
    for watched in (False, True):
        model = DistributedDataParallel(made(Model))
        optimizer = torch.optim.Adam(model.parameters())
        metric = PerSampleGradNorms(loss_reduction="mean")
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        train(model, optimizer, [inputs(rank, step, 3) for step in range(5)])
        found.append(weights(model))
        if monitor is not None:
            monitor.close()
    assert_equal(*found)


def check_no_sync(rank: int) -> None:
    model = made(Model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metric = PerSampleGradNorms(loss_reduction="mean", scale=0.5)
    norms = []
    with Monitor(wrapped, optimizer, metrics=[metric]) as monitor:
        for step in range(2):
            optimizer.zero_grad()
            first, second = inputs(rank, 2 * step, 3), inputs(rank, 2 * step + 1, 3)
            norms += [totals(model, x) for x in (first, second)]
            with wrapped.no_sync():
                (sum_loss(wrapped(first)) / 6).backward()
                torch.testing.assert_close(metric.per_sample, norms[-2], rtol=2e-5, atol=0)
            (sum_loss(wrapped(second)) / 6).backward()
            torch.testing.assert_close(metric.per_sample, norms[-1], rtol=2e-5, atol=0)
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
            optimizer.step()
            if step == 0:  # of all ranks' samples; of the norms' mean this rank's
                result = monitor.compute()[NAME]
                small, big = torch.cat(norms).square().mean().item(), gradient.square().sum().item()
                assert result.gradient_sq["total"].mean.value == pytest.approx((12 * big - small) / 11, rel=1e-4)
        assert monitor.compute()[NAME].norm["total"].mean.count == 12


def check_join(rank: int) -> None:
    model = DistributedDataParallel(made(Model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")]) as monitor:
        with model.join():
            train(model, optimizer, [inputs(rank, step, 3) for step in range(2 + rank)])
        assert monitor.compute()[NAME].norm["total"].mean.count == 3 * (2 + rank)


def check_fsdp(rank: int, *, checkpointed: bool = False, early: bool = False, **settings: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for size in (3, 1):
        model = made(lambda: Model(checkpointed))
        exact = copy.deepcopy(model)
        for part in (model.first, *model.blocks, model):
            fully_shard(part, mesh=mesh, **settings)
        metric = local_loop(rank, model, exact, size, {})
        assert set(metric.per_parameter) == {name for name, _ in exact.named_parameters()}


def check_fsdp_noise_scale(rank: int) -> None:
    """Of a sharded gradient's norm a rank knows its part; there is no number and a reason."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(made(Model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")]) as monitor:
        train(model, optimizer, [inputs(rank, 0, 3)])
        result = monitor.compute()[NAME]
        assert result.norm["total"].mean.count == 3
        assert not result.gradient_sq["total"].mean.value > -1e300  # NaN
        assert "sharded" in result.details["noise_scale_off"]


def check_tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(torch.randn(3, 5))).backward()
        with pytest.raises(RuntimeError, match=r"tensor parallelism.* call sync_norms\(\) on each"):
            _ = norms.per_sample


DDP: dict[str, Callable[[int], None]] = {
    "plain": check_ddp,
    "static graph": lambda rank: check_ddp(rank, static_graph=True),
    "unused parameters": lambda rank: check_ddp(rank, find_unused_parameters=True),
    "bucket views": lambda rank: check_ddp(rank, gradient_as_bucket_view=True),
    "unchanged": check_ddp_unchanged,
    "no_sync": check_no_sync,
    "join": check_join,
}
FSDP: dict[str, Callable[[int], None]] = {
    "plain": check_fsdp,
    "not resharded": lambda rank: check_fsdp(rank, reshard_after_forward=False),
    "checkpointed": lambda rank: check_fsdp(rank, checkpointed=True),
    "noise scale": check_fsdp_noise_scale,
    "tensor parallel": check_tensor_parallel,
}


def work(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    failures = []
    try:
        for case, run in (DDP if name == "DDP" else FSDP).items():
            torch.manual_seed(0)
            try:
                run(rank)
            except BaseException:
                failures.append(f"{case}: {traceback.format_exc()}")
                break  # the ranks would not meet again
    finally:
        Path(folder, f"failures{rank}").write_text("\n".join(failures))
        dist.destroy_process_group()


@pytest.mark.ci
@pytest.mark.parametrize("name", ["DDP", "FSDP"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    run_ranks(work, str(tmp_path), name)
    for rank in range(2):
        assert not Path(tmp_path, f"failures{rank}").read_text()


# ---- one rank, no process group


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "wrap", [Wrapper, lambda m: Wrapper(Wrapper(m)), lambda m: nn.DataParallel(m, device_ids=[])], ids="wnd"
)
def test_wrappers_keep_names(wrap: Callable[[nn.Module], nn.Module], size: int) -> None:
    model = made(Model)
    wrapped, x = wrap(model), inputs(0, 0, size)
    expected = norms_sq(model, samples_of((x,), size), sum_loss)
    with PerSampleGradNorms(wrapped, loss_reduction="sum", methods={"first": "direct"}) as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(wrapped(x)).backward()
            for name, row in expected.items():
                assert torch.allclose(metric.per_parameter[name], row.sqrt(), rtol=2e-5)
