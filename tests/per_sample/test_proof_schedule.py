"""When passes are proved, what a proof may not disturb, and what it leaves out."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from models import Graph
from per_sample_models import Transformer, made, mlp, sum_loss, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms, layers
from lipcore.capture.layers import proof_schedule, proofs
from lipcore.capture.layers.proof_schedule import ProofSchedule
from lipcore.layers import Batch, Factor
from lipcore.layers.factor_outer import Outer


def passes_of(schedule: ProofSchedule, shapes: list[tuple[int, ...]]) -> list[int]:
    return [number for number, shape in enumerate(shapes, 1) if schedule.due(shape, shape[0])]


def test_distances_double_up_to_4096() -> None:
    found = passes_of(ProofSchedule(), [(8, 3)] * 13000)
    assert found == [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288]


def test_a_pass_of_one_sample_puts_the_proof_off() -> None:
    assert passes_of(ProofSchedule(), [(1, 3)] * 70 + [(8, 3)] * 10) == [71]


def test_new_numbers_of_samples_and_dimensions_are_proved_as_they_come() -> None:
    assert passes_of(ProofSchedule(), [(8, 3), (8, 3), (5, 3), (8, 3, 2), (5, 3)]) == [1, 3, 4]
    many = passes_of(ProofSchedule(), [(2 + i, 3) for i in range(200)])
    assert many[:8] == [*range(1, 9)]
    assert len(many) <= 14


def test_new_sizes_are_proved_once_per_distance() -> None:
    found = passes_of(ProofSchedule(), [(8, 3 + i) for i in range(300)])
    assert len(found) <= 8
    assert found[:2] == [1, 2]


def test_what_is_left_open_is_asked_again_ever_more_rarely() -> None:
    schedule, found = ProofSchedule(), []
    for number in range(1, 200):
        if schedule.due((8, 3), 8):
            found.append(number)
            schedule.ask_again((2, 8))
    assert found[:5] == [1, 2, 3, 5, 9]
    assert len(found) < 20


def test_under_a_process_group_the_number_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_schedule, "under_process_group", lambda: True)
    schedule, found = ProofSchedule(), []
    for number in range(1, 300):
        if schedule.due((1 + number % 5, 3 + number), 1 + number % 5):
            found.append(number)
            schedule.ask_again((2, 1 + number % 5))
    assert found == [1, 2, 4, 64, 128, 256]


def test_a_proof_is_left_out_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "free_bytes", lambda device: 100)
    with PerSampleGradNorms(model := made(mlp), loss_reduction="sum") as metric:
        sum_loss(model(torch.randn(400, 5))).backward()
        assert "another backward pass needs about" in metric.unproved


class Careless(nn.Module):
    """Keeps what it sees, counts, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 1)
        self.kept: list[Tensor] = []
        self.calls, self.total = 0, torch.zeros(())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.a(x))
        self.kept.append(self.hidden)
        self.calls += 1
        self.total.add_(1)
        self.seen += 1
        noise = 1 + random.random() + float(np.random.rand())  # noqa: NPY002
        y: Tensor = self.b(F.dropout(self.hidden, 0.2)) * noise
        return y


def test_a_proof_leaves_no_trace() -> None:
    def run(watched: bool) -> list[Any]:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = made(Careless)
        metric = PerSampleGradNorms(model, loss_reduction="sum") if watched else None
        for size in (3, 5, 3):
            output = model(torch.randn(size, 5))
            (output.sum() + model.hidden.square().sum()).backward()
            assert len(model.kept) == model.calls
        if metric is not None:
            assert metric.unproved == ""
            metric.close()
        state = [model.calls, float(model.total), float(model.seen), random.random(), float(np.random.rand())]  # noqa: NPY002
        return [*state, *torch.rand(3).tolist(), *(p.grad for p in model.parameters())]

    for mine, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


def test_the_casts_that_autocast_keeps_have_their_graph() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(torch.randn(4, 5)).float()).backward()
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("flaw", ["", "moves", "detaches"])
def test_compiled_models(flaw: str) -> None:
    class Flawed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x.flip(0) if flaw == "moves" else x)
            return y.flip(0) if flaw == "moves" else y - y.mean(0).detach() if flaw == "detaches" else y

    model = torch.compile(made(Flawed), backend="aot_eager")
    if not flaw:
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            sum_loss(model(torch.randn(5, 5))).backward()
            assert metric.unproved == ""
        return
    message = {"moves": "moves its samples", "detaches": "other samples are exchanged"}[flaw]
    with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match=message):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            sum_loss(model(torch.randn(5, 5))).backward()


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(4, 5)), scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.weight)


class ScaledRule(layers.Rule):
    """Right for a scale of 1."""

    def save(self, module: nn.Module, arguments: Any, keywords: Any, batch: Batch) -> tuple[tuple[Tensor, ...], Any]:
        return (arguments[0],), batch

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        return {"weight": Outer(extra.tokens(saved[0]), extra.tokens(grad_output))}


def test_a_rule_of_the_users_is_compared_with_autograd() -> None:
    if Scaled not in layers.registered():
        layers.register(Scaled, ScaledRule())
    for scale in (1.0, 0.1):
        model = made(lambda scale=scale: nn.Sequential(Scaled(scale), nn.Linear(4, 1)))
        if scale == 1:
            with PerSampleGradNorms(model, loss_reduction="sum") as metric:
                model(torch.randn(3, 5)).sum().backward()
                assert metric.unproved == ""
            continue
        with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match="the rule ScaledRule"):
            with PerSampleGradNorms(model, loss_reduction="sum"):
                model(torch.randn(3, 5)).sum().backward()


def test_two_metrics_do_not_disturb_each_other() -> None:
    model = made(Transformer)
    with PerSampleGradNorms(model, loss_reduction="sum") as one, PerSampleGradNorms(model, loss_reduction="sum") as two:
        sum_loss(model(tokens(4))).backward()
        assert torch.equal(one.per_sample, two.per_sample)
        for metric in (one, two):
            assert (metric.unproved, metric.broken) == ("", "")
            assert not metric.compute().details["unrecorded"]


def test_a_forward_pass_that_raises_uses_up_no_proof() -> None:
    fails = [True]

    def way(m: Any, x: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("the user's own mistake")
        y: Tensor = m.b(torch.tanh(m.a(x)))
        return y

    model = Graph(way, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        with pytest.raises(RuntimeError, match="own mistake"):
            model(torch.randn(5, 3))
        fails.clear()
        model(torch.randn(5, 3)).sum().backward()
        assert metric.unproved == ""
