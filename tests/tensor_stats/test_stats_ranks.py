"""TensorStats of several ranks together: parameters count once, outputs on every rank, shards as parts of a whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_rank import one_rank
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lipcore import Monitor, TensorStats, reference
from lipcore.distributed.ownership import Ownership, describe
from lipcore.distributed.packed import folded
from lipcore.metric import MetricResult

RANKS = (0, 1, 2)
STATISTICS = ("mean", "sd", "min", "max", "kurtosis", "zeros", "nonfinite")


def numbers_of(result: MetricResult, quantity: str, place: str) -> list[float]:
    found = result[quantity][place]
    return [float(found["mean"].count), *(found[name].value for name in STATISTICS)]


def truth_of(tensors: list[Tensor]) -> list[float]:
    row = reference.tensor_stats([torch.cat([tensor.detach().flatten().double() for tensor in tensors])])[0][0]
    n, mean, m2, _, m4, low, high, zeros, nonfinite = row.tolist()
    return [n, mean, math.sqrt(m2 / n), low, high, n * m4 / m2**2, zeros / (n + nonfinite), nonfinite]


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(rank: int) -> Tensor:
    return torch.randn(4 + rank, 6, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def test_parts_of_ranks_add_up() -> None:
    """Without processes: each rank's metric, the owners among them, and one reduction after the other."""
    parts, outputs, models = [], [], [make() for _ in RANKS]
    for rank, model in enumerate(models):
        stats = TensorStats(every_steps=1, logits=True)
        with Monitor(model, metrics=[stats]) as monitor:
            out = model(batch(rank))
            outputs.append(out.detach())
            out.sum().backward()
            for parameter in model.parameters():  # as after an all-reduce
                parameter.grad.fill_(0.5)
                parameter.grad.view(-1)[0] = math.nan
            monitor.step()
            parts.append(stats.rank_part())
    held = [describe(part.holding._parameters()) for part in parts]
    for rank, part in enumerate(parts):
        part.holding.turn_to(RANKS)
        part.holding.ownership = Ownership.of(held, RANKS, rank)
    assert len({json.dumps(part.agreed) for part in parts}) == 1
    result = parts[0].result(folded(lambda: [part.packed() for part in parts]))
    own = parts[0].watched
    assert own.size.nbytes == parts[0].nbytes
    for name, parameter in models[0].named_parameters():
        assert numbers_of(result, "parameter", name) == pytest.approx(truth_of([parameter]), rel=1e-10)
    assert numbers_of(result, "output", "(model)") == pytest.approx(truth_of(outputs), rel=1e-10)
    everything = list(models[0].parameters())
    assert numbers_of(result, "parameter", "total") == pytest.approx(truth_of(everything), rel=1e-10)
    size = torch.cat([out.flatten() for out in outputs]).abs()
    assert result.output["(model)"].abs_p50.value == pytest.approx(size.median().item(), rel=1 / 15)
    assert result.logsumexp["(model)"].max.value == pytest.approx(max(o.logsumexp(1).max().item() for o in outputs))
    assert result.details["forward_passes"] == 3


# ---- in processes


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for way in ("ddp", "fsdp2"):
        model: Any = make()
        if way == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, metrics=[TensorStats(every_steps=2)], window_steps=4, timeout=30) as monitor:
            for _ in range(4):
                optimizer.zero_grad()
                model(batch(rank)).square().mean().backward()
                optimizer.step()
            window = monitor.global_window()
        assert window["tensor_stats"].details["forward_passes"] == 4
        Path(folder, f"{way}.{rank}.json").write_text(json.dumps(window["tensor_stats"].to_dict()))
    dist.destroy_process_group()


@pytest.mark.ci
def test_ranks_that_train_one_model(tmp_path: Path) -> None:
    """Against one process that has seen every rank's batch."""
    run_ranks(work, str(tmp_path), ranks=2)
    model, seen = make(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        outputs = [model(batch(rank)) for rank in range(2)]
        sum(out.square().mean() / 2 for out in outputs).backward()
        if step % 2:
            seen.setdefault(("output", "(model)"), []).extend(out.detach().clone() for out in outputs)
            for name, p in model.named_parameters():
                seen.setdefault(("gradient", name), []).append(p.grad.clone())
        optimizer.step()
        for name, p in model.named_parameters() if step % 2 else ():
            seen.setdefault(("parameter", name), []).append(p.detach().clone())
    for way in ("ddp", "fsdp2"):
        states = [json.loads((tmp_path / f"{way}.{rank}.json").read_text()) for rank in range(2)]
        assert states[0] == states[1]
        result = MetricResult.from_dict("tensor_stats", states[0])
        for (quantity, place), tensors in seen.items():
            assert numbers_of(result, quantity, place) == pytest.approx(truth_of(tensors), rel=2e-4, abs=1e-6), (
                way,
                place,
            )


# ---- outputs that a collective still brings


class AddedUp(nn.Linear):
    """A layer that returns the sum over ranks before it has come, as `RowwiseParallel()` has a layer do."""

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(super().forward(x), "sum", dist.group.WORLD)


def test_outputs_that_a_collective_still_brings_are_read() -> None:
    torch.manual_seed(0)
    with one_rank():
        model, x = nn.Sequential(AddedUp(6, 4), nn.Tanh()), torch.randn(5, 6)
        expected = nn.functional.linear(x, model[0].weight, model[0].bias)
        stats = TensorStats(every_steps=1)
        with Monitor(model, metrics=[stats]) as monitor:
            assert hasattr(model[0](x), "trigger_wait")
            model(x).sum().backward()
            monitor.step()
            result = stats.compute()
    assert "not_read" not in result.details
    assert numbers_of(result, "output", "0") == pytest.approx(truth_of([expected]), rel=1e-6)


def parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(make().double(), init_device_mesh("cpu", (2,)), plan)
    x = torch.cat([batch(0), batch(1)]).double()
    optimizer, stats = torch.optim.SGD(model.parameters(), lr=0.1), TensorStats(every_steps=1)
    with Monitor(model, optimizer, metrics=[stats], window_steps=1, timeout=30) as monitor:
        model(x).square().mean().backward()
        optimizer.step()
        window = monitor.global_window()["tensor_stats"]
    Path(folder, f"parallel.{rank}.json").write_text(json.dumps(window.to_dict()))
    dist.destroy_process_group()


@pytest.mark.ci
def test_outputs_of_a_tensor_parallel_plan(tmp_path: Path) -> None:
    """Of what ranks have in parts the parts are read, and what all compute alike counts on each."""
    run_ranks(parallel, str(tmp_path), ranks=2)
    x, model = torch.cat([batch(0), batch(1)]).double(), make().double()
    hidden = model[0](x)
    expected = {"0": [hidden], "1": [hidden.relu()], "2": [model(x)] * 2, "(model)": [model(x)] * 2}
    for rank in range(2):
        result = MetricResult.from_dict("tensor_stats", json.loads((tmp_path / f"parallel.{rank}.json").read_text()))
        assert "not_read" not in result.details
        for place, tensors in expected.items():
            assert numbers_of(result, "output", place) == pytest.approx(truth_of(tensors), rel=1e-9), place
