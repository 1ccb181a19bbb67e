"""What shapes and hooks do not show is found by the first pass's proof, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from per_sample_models import assert_equal, made
from per_sample_oracle import check, norms_sq, samples_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradNorms

SIZE = 4  # samples, positions and features


class Positions(nn.Module):
    """Positions [T] where T = B, joined to the tokens in many ways."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.e, self.p, self.join = nn.Embedding(9, SIZE), nn.Embedding(SIZE, SIZE), join

    def forward(self, ids: Tensor) -> Tensor:
        return self.join(self, self.e(ids)).tanh().flatten(1).sum(1)


JOINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "repeat": lambda m, x: x + m.p(torch.arange(SIZE)).repeat(SIZE, 1, 1),
    "stack": lambda m, x: x + torch.stack([m.p(torch.arange(SIZE))] * SIZE),
    "addcmul": lambda m, x: torch.addcmul(x, m.p(torch.arange(SIZE)), torch.ones(SIZE)),
    "padded": lambda m, x: x + F.pad(m.p(torch.arange(SIZE)), (0, 0, 0, 0)),
    "step by step": lambda m, x: torch.stack([x[:, t] + m.p(torch.arange(SIZE))[t] for t in range(SIZE)], 1),
    "product": lambda m, x: x @ m.p(torch.arange(SIZE)).T,
    "relative": lambda m, x: x + m.p((torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs()).permute(2, 0, 1),
}


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), forward

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


@dataclass
class Output:
    hidden: Tensor
    name: str = "output"


class OwnBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


MIXED: dict[str, Callable[[Any, Tensor], Any]] = {
    "centred": lambda m, x: m.b((h := m.a(x)) - h.mean(0)),
    "functional batch norm": lambda m, x: m.b(F.batch_norm(m.a(x), None, None, training=True)),
    "attention over samples": lambda m, x: m.b((m.a(x) @ m.a(x).T).softmax(1) @ m.a(x)),
}
ELSEWHERE: dict[str, Callable[[Any, Tensor], Any]] = {
    "dataclass": lambda m, x: Output(F.linear(torch.tanh(m.a(x)), m.a.weight)),
    "reparametrised": lambda m, x: m.b(m.a(x) / m.a.weight.norm()),
    "call without grad": lambda m, x: F.linear(m.a(x), m.a.weight) + 0 * _quietly(m.a, x),
    "unused call": lambda m, x: (m.a(x), F.linear(torch.tanh(m.b(x)), m.a.weight))[1],
}


def square(output: Any) -> Tensor:
    return (output.hidden if isinstance(output, Output) else output).square().sum()


def _quietly(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = layer(x)
    return result


def refused(model: nn.Module, inputs: Tensor, message: str, **options: Any) -> None:
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=message):
        with PerSampleGradNorms(model, loss_reduction="sum", **options) as metric:
            square(model(inputs)).backward()
            assert metric.per_sample.isnan().all()


@pytest.mark.parametrize("join", JOINS)
def test_positions_that_are_as_many_as_samples(join: str) -> None:
    model, ids = made(lambda: Positions(JOINS[join])), torch.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 9
    refused(model, ids, r"'p.weight'.*broadcast=|'p' .*broadcast=", max_replay_bytes=0)
    if join not in ("repeat", "stack", "relative"):  # which are for batches of this size alone
        check(model, (ids,), loss=square)


@pytest.mark.parametrize("way", MIXED)
def test_models_that_mix_their_samples(way: str) -> None:
    refused(made(lambda: Model(MIXED[way])), torch.randn(SIZE, SIZE), r"'a.weight': of one sample|'a.weight': is used")


@pytest.mark.parametrize("way", ELSEWHERE)
def test_weights_that_are_used_elsewhere(way: str) -> None:
    model, x = made(lambda: Model(ELSEWHERE[way])), torch.randn(SIZE, SIZE)
    refused(model, x, r"'a.weight': (of one sample|is used|has a gradient)", max_replay_bytes=0)
    expected = norms_sq(model, samples_of((x,), SIZE), square)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        square(model(x)).backward()
        for name, row in expected.items():
            found = metric.per_parameter[name].nan_to_num(0)  # no gradient reached it
            assert torch.allclose(found, row.sqrt(), rtol=1e-5), name
        total = torch.stack(list(expected.values())).sum(0).sqrt()
        assert torch.allclose(metric.per_sample, total, rtol=1e-5)
        assert not metric.unproved


def test_what_mixes_samples_leaves_no_number_in_skip_mode() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(SIZE, SIZE), OwnBatchNorm(SIZE, affine=False), nn.Linear(SIZE, 1)))
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as metric:
        model(torch.randn(5, SIZE)).sum().backward()
        assert set(metric.per_parameter) == {"2.weight", "2.bias"}
        assert "of one sample" in metric.coverage().uncovered["0.weight"]


def test_tensors_computed_from_parameters_in_their_place() -> None:
    model = made(lambda: nn.Linear(SIZE, 2))
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="'weight' is computed from other tensors"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            halved = {name: p * 0.5 for name, p in model.named_parameters()}
            torch.func.functional_call(model, halved, (torch.randn(3, SIZE),)).sum().backward()


def test_a_global_hook_that_rewrites_outputs() -> None:
    model = made(lambda: nn.Linear(SIZE, 2))
    handle = nn.modules.module.register_module_forward_hook(lambda module, arguments, output: output * 2)
    try:
        refused(model, torch.randn(3, SIZE), "register_module_forward_hook")
    finally:
        handle.remove()


def test_broadcast_names_no_layer_that_has_the_batch() -> None:
    model = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 2))
    refused(model, torch.arange(12).reshape(3, 4) % 9, r"module '0'.*broadcast: names this layer", broadcast=["0"])
    with pytest.raises(ValueError, match="broadcast: .*batch_dim=1"):
        PerSampleGradNorms(model, loss_reduction="sum", broadcast=["0"], batch_dim=1)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.c = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.c, self.i(x), use_reentrant=True)
        return y


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_reentrant_checkpoint_with_nothing_behind_it(size: int) -> None:
    """In every backward pass, the process's first one or not."""
    model, x = made(Last), torch.linspace(-1, 1, 3 * size).reshape(size, 3)
    expected = []
    for sample in x.split(1):
        y = model.c(model.i(sample))
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        expected.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
            assert torch.allclose(metric.per_sample.float(), torch.stack(expected), rtol=1e-5)


def test_the_proof_changes_nothing() -> None:
    """Dropout's random numbers, gradients and parameters are those of an unwatched run."""

    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(SIZE, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        metric = PerSampleGradNorms(model, loss_reduction="mean") if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, SIZE)).square().mean().backward()
            optimizer.step()
        if metric is not None:
            metric.close()
        return [p.grad for p in model.parameters()] + list(model.parameters())

    assert_equal(run(True), run(False))


@pytest.mark.parametrize("prove", [True, False])
def test_every_new_number_of_samples_is_proved(prove: bool) -> None:
    seen: list[Tensor] = []

    def way(model: Any, x: Tensor) -> Tensor:
        hidden = model.a(x)
        hidden.register_hook(lambda grad: seen.append(grad))
        result: Tensor = model.b(hidden)
        return result

    model = made(lambda: Model(way))
    with PerSampleGradNorms(model, loss_reduction="sum", prove=prove):
        for size in (1, 3, 5):
            model(torch.randn(size, SIZE))
    # Without weights and with them, of every number of samples that is new.
    assert [len(grad) for grad in seen] == ([3, 3, 5, 5] if prove else [])
