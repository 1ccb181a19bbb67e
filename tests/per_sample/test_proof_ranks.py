"""The weighted pass on two ranks, under DistributedDataParallel and fully_shard: what it finds, and that training is
bit for bit the same."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from per_sample_models import made, sum_loss
from per_sample_oracle import norms_sq, samples_of
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lipcore import PerSampleGradNorms
from lipcore.capture import proof_ranks

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")


class Model(nn.Module):
    def __init__(self, *, moves: bool = False, detaches: bool = False, mixes: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.moves, self.detaches, self.mixes = moves, detaches, mixes

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x.flip(0) if self.moves else x))
        if self.detaches:
            hidden = hidden - hidden.mean(0).detach()
        if self.mixes:
            hidden = hidden - hidden.mean(0)
        y: Tensor = self.c(torch.relu(self.b(hidden)))
        return y.flip(0) if self.moves else y


def sharded(model: Model, **settings: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in (model.a, model.b, model.c):
        fully_shard(part, **settings)
    wrapped: nn.Module = fully_shard(model, **settings)
    return wrapped


def hooked(model: Model) -> nn.Module:
    for layer in (model.a, model.b):
        layer.register_full_backward_hook(lambda module, into, out: None)
    return DistributedDataParallel(model)


WRAPS: dict[str, Callable[[Model], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "module backward hooks": hooked,
    "FSDP": sharded,
    "FSDP, not resharded": lambda model: sharded(model, reshard_after_forward=False),
}


def gradients(rank: int, wrap: Callable[[Model], nn.Module], watched: bool) -> list[Tensor]:
    model = wrap(made(Model))
    metric = PerSampleGradNorms(model, loss_reduction="sum") if watched else None
    torch.manual_seed(1 + rank)
    found = []
    for step in range(5):  # batches of another size on each rank, one of them of a single sample
        model.zero_grad()
        sum_loss(model(torch.randn(1 + (step + rank) % 4, 5))).backward()
        found += [(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).clone() for p in model.parameters()]
    if metric is not None:
        metric.close()
    return found


def check_unchanged(rank: int, wrap: Callable[[Model], nn.Module]) -> None:
    for mine, theirs in zip(gradients(rank, wrap, True), gradients(rank, wrap, False), strict=True):
        assert torch.equal(mine, theirs)


def check_proved(rank: int, name: str) -> None:
    model = WRAPS[name](made(Model))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        unproved = []
        for _ in range(3):
            sum_loss(model(torch.randn(5, 5))).backward()
            unproved.append(metric.unproved)
        if name == "static graph":
            assert "static_graph" in unproved.pop(0)
        expected = "statistics over the batch that the model may detach were not looked for: it is sharded"
        assert set(unproved) == {expected if "FSDP" in name else ""}, unproved


def check_refused(name: str) -> None:
    flaws = {"moves": "moves its samples", "mixes": "parts at other samples"}
    if "FSDP" not in name:
        flaws["detaches"] = "samples are exchanged"
    for flaw, message in flaws.items():
        model = WRAPS[name](made(lambda flaw=flaw: Model(**{flaw: True})))
        with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match=message):
            with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0) as metric:
                for _ in range(2):
                    sum_loss(model(torch.randn(5, 5))).backward()
                assert metric.per_sample is not None


class WithoutRules(nn.Module):
    """A scale of its own, and samples that are moved and brought back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Identity(), nn.Linear(8, 2)
        self.g = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.b(self.a(x.flip(0)) * self.g))).flip(0)
        return y


def check_without_rules(rank: int, name: str) -> None:
    """The graph serves below DistributedDataParallel, on ranks with other numbers of samples; sharded models are
    refused."""
    torch.manual_seed(3 + rank)
    model = WRAPS[name](made(WithoutRules))
    if "FSDP" in name:
        with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="'g': .* it: it is sharded; nor can a rule"):
            with PerSampleGradNorms(model, loss_reduction="sum"):
                sum_loss(model(torch.randn(5, 5))).backward()
        return
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for step in range(4):
            x = torch.randn(3 + rank, 5)
            expected = norms_sq(model.module, samples_of((x,), len(x)), sum_loss)
            model.zero_grad()
            sum_loss(model(x)).backward()
            if name != "static graph" or step > 0:
                total = torch.stack(list(expected.values())).sum(0).sqrt()
                assert torch.allclose(metric.per_sample, total, rtol=1e-5)
                assert not metric.unproved


def check_on_one_rank(rank: int) -> None:
    """No rank waits for one that has no metric, or none any more."""
    model = WRAPS["FSDP"](made(Model))
    metric = PerSampleGradNorms(model, loss_reduction="sum")
    for step in range(66):
        sum_loss(model(torch.randn(5, 5))).backward()
        if step == 0:
            assert "not all" not in metric.unproved
        if step == 62 and rank == 1:
            metric.close()
    if rank == 0:
        assert "not all of its ranks" in metric.unproved
        metric.close()
    for alone in (True, False):
        metrics = [PerSampleGradNorms(model, loss_reduction="sum")] if rank == 0 or not alone else []
        for _ in range(5):
            sum_loss(model(torch.randn(5, 5))).backward()
        for metric in metrics:
            assert "not all of its ranks have this metric, or were here in time" in metric.unproved
            metric.close()


def work(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    failure = ""
    try:
        check_unchanged(rank, WRAPS[name])
        check_proved(rank, name)
        check_refused(name)
        if name != "module backward hooks":
            check_without_rules(rank, name)
        if name == "FSDP":
            check_on_one_rank(rank)
    except BaseException:
        failure = traceback.format_exc()
    Path(folder, f"failure{rank}").write_text(failure)
    dist.destroy_process_group()


def work_again(rank: int, folder: str) -> None:
    """Each group has keys of its own in one store: gloo's of an earlier group would be taken for those of this one."""
    torch.set_num_threads(1)
    store, found = dist.FileStore(f"{folder}/store", 2), []
    for number in range(2):
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=2)
        model = WRAPS["FSDP"](made(Model))
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            for _ in range(2):
                sum_loss(model(torch.randn(5, 5))).backward()
            found.append(metric.unproved)
        dist.barrier()
        dist.destroy_process_group()
    Path(folder, f"found{rank}").write_text("\n".join(found))


@pytest.mark.ci
def test_a_process_group_that_is_made_again(tmp_path: Path) -> None:
    run_ranks(work_again, str(tmp_path))
    for rank in range(2):
        found = Path(tmp_path, f"found{rank}").read_text().split("\n")
        assert found == ["statistics over the batch that the model may detach were not looked for: it is sharded"] * 2


def test_a_store_that_outlives_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    store, model, here = dist.HashStore(), nn.Linear(2, 2), [0]
    mesh = SimpleNamespace(mesh=torch.arange(2), size=lambda: 2)
    for name, stands_in in (
        ("default_store", lambda: store),
        ("mesh_of", lambda model: mesh),
        ("rank", lambda: here[0]),
    ):
        monkeypatch.setattr(proof_ranks, name, stands_in)

    def made_on(rank: int) -> proof_ranks.Ranks:
        here[0] = rank
        return proof_ranks.Ranks(model)

    for _ in range(3):
        both = [made_on(rank) for rank in range(2)]
        for ranks in both:
            ranks.announce(1)
        assert [ranks.agree(1) for ranks in both] == [True, True]
    alone = made_on(0)
    alone.announce(1)
    assert not alone.agree(1)


@pytest.mark.ci
@pytest.mark.parametrize("name", WRAPS)
def test_two_ranks(name: str, tmp_path: Path) -> None:
    run_ranks(work, str(tmp_path), name)
    for rank in range(2):
        assert not Path(tmp_path, f"failure{rank}").read_text()
