"""Parameters without a rule inside activation checkpoints, where nodes of the graph may be run once only."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models_without_rules import WITHOUT_RULES, C, T
from per_sample_models import assert_equal, made
from per_sample_oracle import assert_norms, check, norms_sq, samples_of, weighted_sum
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipcore

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
@pytest.mark.parametrize("name", WITHOUT_RULES.keys() - _ELSEWHERE)
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
