"""Parameters without a rule inside activation checkpoints, where nodes of the graph may be run once only."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import Square
from models import Graph
from models_without_rules import WITHOUT_RULES, C, OwnRMSNorm, T
from per_sample_models import assert_equal, made
from per_sample_oracle import assert_norms, check, norms_sq, samples_of, weighted_sum
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipcore
from lipcore.capture.graph.own_graph import OwnGraph

PerSampleGradNorms = functools.partial(lipcore.PerSampleGradNorms, max_replay_bytes=1 << 30)


class Switched(nn.Module):
    """A layer, and a part that is inside a checkpoint where that is on."""

    def __init__(self, part: nn.Module, on: bool = True) -> None:
        super().__init__()
        self.first, self.part, self.on = nn.Linear(C, C), part, on

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = checkpoint(self.part, h, use_reentrant=False) if self.on else self.part(h)
        return y


#: Whose parameters are used where their own module is not called.
_ELSEWHERE = {"two of one product", "weight norm", "spectral norm", "pruned", "used elsewhere", "tied decoder"}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", [name for name in WITHOUT_RULES if name not in _ELSEWHERE])
def test_against_one_sample_at_a_time(name: str, size: int) -> None:
    model = Switched(made(WITHOUT_RULES[name]))
    metric = check(model, (torch.randn(size, T, C),), max_replay_bytes=1 << 30)
    assert not metric.coverage().uncovered


@pytest.mark.parametrize("name", sorted(_ELSEWHERE))
def test_the_next_passes_keep_what_is_used_elsewhere(name: str) -> None:
    model, x = Switched(made(WITHOUT_RULES[name])), torch.randn(4, T, C)
    expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(3):
            model.zero_grad()
            weighted_sum(model(x)).backward()
            if metric.per_sample.isnan().any():
                assert "inside an activation checkpoint" in metric.broken
        assert_norms(metric, expected)
        assert not metric.unproved


class Blocks(nn.Module):
    """A bias that the first block owns and all use, each behind an operation inside its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(Biased(i == 0)) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = checkpoint(block[0], x, bias, use_reentrant=False)  # type: ignore[index, misc]
        return x


class Biased(nn.Module):
    def __init__(self, owner: bool) -> None:
        super().__init__()
        self.mix, self.table = nn.Linear(C, C), nn.Embedding(3, C) if owner else None

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.table is not None:
            bias = self.table(torch.arange(T) % 3)
        assert bias is not None
        return self.mix(x).tanh() + bias.sin(), bias


def test_what_the_first_of_several_blocks_owns() -> None:
    model, x = made(Blocks), torch.randn(4, T, C)
    expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(5):
            model.zero_grad()
            weighted_sum(model(x)).backward()
        assert_norms(metric, expected)


def test_the_bound_on_what_is_kept() -> None:
    model, x = Switched(made(WITHOUT_RULES["two of one product"])), torch.randn(4, T, C)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="checkpointing.*or raise max_replay_bytes=700"):
        with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=700):
            for _ in range(4):
                weighted_sum(model(x)).backward()


def test_the_bound_of_operations() -> None:
    model, x = Switched(made(WITHOUT_RULES["two of one product"])), torch.randn(4, T, C)
    expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match="'part.f.w'.* max_replay_flops=25,823;"),
    ):
        with PerSampleGradNorms(model, loss_reduction="sum", max_replay_flops=25823):
            for _ in range(4):
                weighted_sum(model(x)).backward()
    with PerSampleGradNorms(model, loss_reduction="sum", max_replay_flops=25824) as metric:
        for _ in range(4):
            model.zero_grad()
            weighted_sum(model(x)).backward()
        assert_norms(metric, expected)


class Drawn(nn.Module):
    """A recomputation that draws other numbers: the training's gradients are those of the second run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(C, C), made(WITHOUT_RULES["own RMSNorm"])

    def forward(self, x: Tensor) -> Tensor:
        def part(h: Tensor) -> Tensor:
            y: Tensor = self.part(h * torch.rand(C))
            return y

        y: Tensor = checkpoint(part, self.first(x), use_reentrant=False, preserve_rng_state=False)
        return y


def test_the_training_has_what_the_checkpoint_has_run_again() -> None:
    model, x = made(Drawn), torch.randn(4, T, C)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, loss_reduction="sum", prove=False):
        for each in (model, plain):
            torch.manual_seed(5)
            weighted_sum(each(x)).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("name", ["own RMSNorm", "Conv1D", "positions", "dropout"])
def test_the_training_is_the_same_bits_while_checkpoints_come_and_go(name: str) -> None:
    model = Switched(made(WITHOUT_RULES[name]))
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for on in (False, True, True, False, True):
            x = torch.randn(4, T, C)
            for each in (model, plain):
                each.on = on
                each.zero_grad()
                weighted_sum(each(x)).backward()
            assert_norms(metric, norms_sq(plain, samples_of((x,), 4), weighted_sum))
            assert not metric.unproved
            assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


# ---- modules that run again in the backward pass, and keep nothing


def run(model: nn.Module, passes: int) -> list[str]:
    """Passes on new samples, each against the oracle; the layers with a graph of their own, which keep nothing."""
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(passes):
            x = torch.randn(4, T, C)
            expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
            model.zero_grad()
            loss = weighted_sum(model(x))
            assert metric._capture is not None
            last = metric._capture.passes.last
            loss.backward()
            assert_norms(metric, expected)
            assert not metric.unproved
        assert metric._capture is not None
        own = [site.name for site in metric._capture.sites if isinstance(site.rule, OwnGraph)]
        assert all(f"{name}" in str(metric.plan()) for name in own)
        assert last is not None
        assert (last.kept is None) == bool(own)
        assert {n.rpartition(".")[0] for n, layer in metric.coverage().covered.items() if "own" in layer} == set(own)
    return own


@pytest.mark.parametrize("name", ["own RMSNorm", "one plus weight", "Conv1D", "recurrence", "layer norm", "GRU"])
def test_later_passes_keep_nothing(name: str) -> None:
    model = Switched(made(WITHOUT_RULES[name]))
    assert len(run(model, 3)) == 1


class Uses(OwnRMSNorm):
    """Twice in a call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x).tanh())


class Noisy(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * torch.rand_like(x))


class Counting(OwnRMSNorm):
    """Makes something else in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + 0.001 * self.calls


class Sums(OwnRMSNorm):
    """What it is called with is changed in place before the backward pass, and it has kept none of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x + 0)


def called(layer: Callable[[], nn.Module], rule: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return made(lambda: Switched(Graph(rule, a=nn.Linear(C, C), n=layer(), b=nn.Linear(C, 3))))


def test_a_parameter_that_one_call_uses_twice() -> None:
    assert run(called(Uses, lambda m, x: m.b(m.n(m.a(x)))), 3) == ["part.n"]


def test_a_module_that_is_called_twice() -> None:
    assert run(called(OwnRMSNorm, lambda m, x: m.b(m.n(m.n(m.a(x)).tanh()))), 3) == ["part.n"]


def test_what_is_changed_in_place_after_the_call() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.a(x) + 0
        y = m.n(h)
        h.mul_(3)
        return m.b(y + h)

    assert run(called(Sums, rule), 3) == ["part.n"]


def test_a_module_whose_weight_is_used_elsewhere_too_keeps_its_tensors() -> None:
    assert run(called(OwnRMSNorm, lambda m, x: m.b(m.n(m.a(x)) + m.n.weight)), 3) == []


@pytest.mark.parametrize("layer", [Noisy, Counting])
def test_modules_that_cannot_run_again_keep_their_tensors(layer: Any) -> None:
    model = called(layer, lambda m, x: m.b(m.n(m.a(x))))
    x = torch.randn(4, T, C)
    with PerSampleGradNorms(model, loss_reduction="sum", prove=False) as metric:
        for _ in range(3):
            model.zero_grad()
            weighted_sum(model(x)).backward()
            assert not metric.per_parameter["part.n.weight"].isnan().any()
        assert metric._capture is not None
        assert not any(isinstance(site.rule, OwnGraph) for site in metric._capture.sites)


def test_two_passes_under_way_while_a_module_stops_to_keep_its_tensors() -> None:
    model = Switched(made(WITHOUT_RULES["own RMSNorm"]))
    plain = copy.deepcopy(model)
    xs = [torch.randn(4, T, C) for _ in range(3)]
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for each in (model, plain):
            weighted_sum(each(xs[0])).backward()
            losses = [weighted_sum(each(x)) for x in xs]
            for loss in losses:
                loss.backward()
        assert_norms(metric, norms_sq(plain, samples_of((xs[-1],), 4), weighted_sum))
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_autocast() -> None:
    model = Switched(made(WITHOUT_RULES["Conv1D"]))
    x = torch.randn(4, T, C)
    found = []
    with PerSampleGradNorms(model, loss_reduction="sum", prove=False) as metric:
        for _ in range(3):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = weighted_sum(model(x))
            loss.backward()
            found.append(metric.per_parameter["part.1.weight"])
        assert metric._capture is not None
        assert any(isinstance(site.rule, OwnGraph) for site in metric._capture.sites)
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=0.0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-2, atol=0.0)


def test_a_call_that_its_own_graph_does_not_show() -> None:
    """Its batch is not where it was: that pass is NaN, and the next ones keep its tensors again."""
    model = called(OwnRMSNorm, lambda m, x: m.b(m.n(m.a(x).flatten(0, m.flat)).view_as(x)))
    model.part.flat = 0  # type: ignore[union-attr]
    run(model, 3)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for flat in (0, 0, 1, 1, 1):
            model.part.flat = flat  # type: ignore[union-attr]
            x = torch.randn(4, T, C)
            expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
            model.zero_grad()
            weighted_sum(model(x)).backward()
            if flat == 0:
                assert_norms(metric, expected)
        assert_norms(metric, expected)


def test_dots_and_sums_of_what_has_a_graph_of_its_own() -> None:
    model = Switched(made(WITHOUT_RULES["Conv1D"]))
    with PerSampleGradNorms(model, loss_reduction="sum", keep_factors=True) as metric:
        for _ in range(3):
            model.zero_grad()
            weighted_sum(model(torch.randn(4, T, C))).backward()
        sums = metric.weighted_sum(torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(metric.gram()["total"].diagonal().sqrt(), metric.per_sample)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sums[name], parameter.grad)


@pytest.mark.parametrize("wrapped", ["0", "1"])
def test_checkpoints_that_are_wrappers_around_modules(wrapped: str) -> None:
    """Their names are not in the canonical ones."""
    wrappers = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = made(lambda: nn.Sequential(nn.Linear(C, C), nn.Sequential(nn.Tanh(), OwnRMSNorm())))
    if wrapped == "0":
        model[1][1] = wrappers.checkpoint_wrapper(model[1][1])
    else:
        model[1] = wrappers.checkpoint_wrapper(model[1])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(3):
            x = torch.randn(4, T, C)
            expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
            model.zero_grad()
            weighted_sum(model(x)).backward()
            total = torch.stack(list(expected.values())).sum(0).sqrt()
            torch.testing.assert_close(metric.per_sample, total, rtol=1e-5, atol=0.0)
        assert "1.1.weight" in metric.per_parameter


def test_a_function_of_the_users_inside_a_checkpoint_is_proved() -> None:
    """What it keeps there is not asked for outside of a backward pass, where layers are tapped in no recomputation."""
    run(called(OwnRMSNorm, lambda m, x: m.b(Square.apply(m.n(m.a(x))))), 3)
