"""Norms of the batch's gradient as backward left it and as the optimizer got it, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batches, mlp, mse, seeded
from points import check_gradients, counted_hooks, gradient_norms
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, Trajectory

STATS = ["grad_norm", "clipped_grad_norm"]
DATA = batches(6, 4)


def watched(model: nn.Module, optimizer: Any, **settings: Any) -> Monitor:
    return Monitor(model, optimizer, [Trajectory(stats=STATS)], **settings)


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, **settings)


CLIPS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda model: None,
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.02),
}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_and_accumulation(clip: str, micro: int) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    before, after = [], []
    with watched(model, optimizer) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            for part in range(micro):
                (mse(model(x + part), y) / micro).backward()
            before.append(gradient_norms(model))
            CLIPS[clip](model)
            after.append(gradient_norms(model))
            optimizer.step()
        result = monitor.compute()["trajectory"]
    check_gradients(result, "grad_norm", before)
    check_gradients(result, "clipped_grad_norm", after)
    assert (before == after) == (clip == "none")
    assert counted_hooks(model) == 0


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4, sparse=True)
        self.head = nn.Linear(4, 1)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(dim=1))


def test_sparse_gradients_and_parameters_without_one() -> None:
    model = seeded(Tokens)
    optimizer = sgd(model)
    truth = []
    with watched(model, optimizer) as monitor:
        for i, (_, y) in enumerate(DATA):
            optimizer.zero_grad()
            tokens = torch.tensor([[1, 2, 2], [3, 1, 1], [i, i, 4], [0, 9, 10]])  # rows repeat: not coalesced
            mse(model(tokens), y).backward()
            truth.append(gradient_norms(model))
            optimizer.step()
        result = monitor.compute()["trajectory"]
    assert truth[-1]["unused.weight"] == 0
    for stage in STATS:
        check_gradients(result, stage, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_other_dtypes_are_measured_exactly(dtype: torch.dtype) -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=dtype)
    optimizer = sgd(model)
    truth = []
    with watched(model, optimizer) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            mse(model(x.to(dtype)), y.to(dtype)).backward()
            truth.append(gradient_norms(model))
            optimizer.step()
        for stage in STATS:
            check_gradients(
                monitor.compute()["trajectory"], stage, truth, rel=1e-12 if dtype == torch.float64 else 1e-6
            )


def test_nan_gradients_are_flagged_and_the_rest_is_not() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    truth = []
    trajectory = Trajectory(model, stats=STATS)
    for i, (x, y) in enumerate(DATA):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        truth.append(gradient_norms(model))
        if i == 1:
            model[0].weight.grad[0, 0] = math.nan
        trajectory.observe_gradients()
        trajectory.update()
    result = trajectory.compute()
    for stage in STATS:
        bad = result[stage]["0.weight"].last
        assert (bad.count, bad.value) == (5, pytest.approx(truth[-1]["0.weight"]))
        assert "1 steps had non-finite values" in bad.note
        for place in ("0.bias", "2.weight", "2.bias", "2"):
            assert result[stage][place].mean.value == pytest.approx(sum(t[place] for t in truth) / len(truth))
            assert not result[stage][place].last.note
        assert math.isfinite(result[stage]["total"].mean.value)


def test_two_backward_passes_of_one_graph() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    truth = []
    with watched(model, optimizer) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward(retain_graph=True)
            loss.backward()
            truth.append(gradient_norms(model))
            optimizer.step()
        check_gradients(monitor.compute()["trajectory"], "grad_norm", truth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = seeded(lambda: mlp(5, 7, 6, 1))
    optimizer = sgd(model)
    truth = []
    with watched(model, optimizer) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            h = checkpoint(model[:3], x.clone().requires_grad_(), use_reentrant=reentrant)
            mse(checkpoint(model[3:], h, use_reentrant=reentrant), y).backward()
            truth.append(gradient_norms(model))
            optimizer.step()
        check_gradients(monitor.compute()["trajectory"], "grad_norm", truth)


def test_a_backward_pass_that_raises_does_not_end_the_recording() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ArithmeticError("as expected")

    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    truth = []
    with watched(model, optimizer) as monitor:
        with pytest.raises(ArithmeticError, match="as expected"):
            model[2](Raises.apply(model[:2](DATA[0][0]))).sum().backward()
        assert model[2].bias.grad is not None
        for x, y in DATA:
            optimizer.zero_grad()
            mse(model(x), y).backward()
            truth.append(gradient_norms(model))
            optimizer.step()
        check_gradients(monitor.compute()["trajectory"], "grad_norm", truth)


def test_a_closure_is_read_after_the_step() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    truth = []
    with watched(model, optimizer) as monitor:
        for x, y in DATA:

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = mse(model(x), y)
                loss.backward()
                truth.append(gradient_norms(model))
                return loss

            optimizer.step(closure)
        for stage in STATS:
            check_gradients(monitor.compute()["trajectory"], stage, truth)


def test_gradients_nobody_announced_are_missed_aloud() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    trajectory = Trajectory(model, stats=STATS)
    mse(model(DATA[0][0]), DATA[0][1]).backward()
    trajectory.update()
    with pytest.warns(UserWarning, match=r"grad_norm lacks 1 steps.*observe_gradients\(\)"):
        result = trajectory.compute()
    assert list(result) == ["clipped_grad_norm"]
    check_gradients(result, "clipped_grad_norm", [gradient_norms(model)])


@pytest.mark.parametrize("assign", [False, True])
def test_gradients_after_weights_were_loaded(assign: bool) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with watched(model, optimizer := sgd(model)) as monitor:
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=assign)
        mse(model(DATA[0][0]), DATA[0][1]).backward()
        optimizer.step()  # after assign=True it owns nothing any more
        check_gradients(monitor.compute()["trajectory"], "grad_norm", [gradient_norms(model)])
    assert counted_hooks(model) == 0


def _rank(rank: int, path: str) -> None:
    """Every rank's own half of the batch; the averaged gradient is that of the whole one."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(path, 2), rank=rank, world_size=2)
    model = seeded(lambda: mlp(5, 7, 1))
    twin = seeded(lambda: mlp(5, 7, 1))
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4)
    optimizer = sgd(wrapped)
    truth = []
    with watched(wrapped, optimizer) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            half = slice(2 * rank, 2 * rank + 2)
            mse(wrapped(x[half]), y[half]).backward()
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            mse(twin(x), y).backward()
            truth.append(gradient_norms(twin))
            optimizer.step()
        for stage in STATS:
            check_gradients(monitor.compute()["trajectory"], stage, truth, rel=1e-5)
    torch.distributed.destroy_process_group()


@pytest.mark.ci
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_distributed_data_parallel(tmp_path: Any) -> None:
    run_ranks(_rank, str(tmp_path / "store"))


def test_sliding_windows_hold_the_norms_of_all_their_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.1), []
    with Monitor(model, optimizer, [Trajectory()], window_steps=10, window_blocks=5) as monitor:
        for step in range(30):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            norms.append(float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()))
            optimizer.step()
            if step % 2 == 1:
                held = torch.tensor(norms[-10:], dtype=torch.float64)
                found = monitor.history[-1]["trajectory"].grad_norm["total"]
                assert found.mean.count == len(held)
                assert found.mean.value == pytest.approx(float(held.mean()), rel=1e-6)
                assert found.max.value == pytest.approx(float(held.max()), rel=1e-6)
                assert found.last.value == pytest.approx(norms[-1], rel=1e-6)


def test_gradients_that_were_taken_away_inside_the_backward_pass_are_missing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    with Monitor(model, metrics=[Trajectory()], window_steps=None) as monitor:
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def step(p: torch.Tensor) -> None:
            optimizers[p].step()  # type: ignore[index]
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(4):
            model(torch.randn(5, 3)).square().mean().backward()
            monitor.step()
        window = monitor.compute()
    assert window is not None
    assert "grad_norm" not in window["trajectory"]
    assert window["trajectory"].update_norm["total"].mean.count == 4
