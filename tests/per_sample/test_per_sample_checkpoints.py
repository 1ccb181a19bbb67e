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
