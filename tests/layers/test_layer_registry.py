"""Which modules get a rule, and what rules refuse."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from lipcore import layers
from lipcore.layers import Batch


class Named(nn.Linear):
    """Computes what Linear does."""

    def __init__(self):
        super().__init__(3, 2)


class Overridden(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OverriddenInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


def test_subclasses_that_compute_the_same_have_the_rule():
    assert layers.rule_for(Named()) is layers.rule_for(nn.Linear(3, 2)) is layers.registered()[nn.Linear]


def test_what_computes_something_else_has_none():
    replaced = nn.Linear(3, 2)
    replaced.forward = lambda x: x
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    for module in (Overridden(3, 2), OverriddenInside(1, 1, 1), replaced, parametrized, nn.LSTM(3, 2), nn.ReLU()):
        assert layers.rule_for(module) is None


def test_register_says_what_it_refuses():
    rule = layers.registered()[nn.Linear]
    with pytest.raises(TypeError, match="expected a subclass of torch.nn.Module, got <class 'int'>"):
        layers.register(int, rule)
    with pytest.raises(TypeError, match="expected a subclass of torch.nn.Module"):
        layers.register(nn.Linear(1, 1), rule)
    with pytest.raises(TypeError, match="pass an object of it"):
        layers.register(nn.Linear, type(rule))
    with pytest.raises(ValueError, match="Linear already has the rule LinearRule; pass replace=True"):
        layers.register(nn.Linear, rule)
    layers.register(nn.Linear, rule, replace=True)
    with pytest.raises(TypeError):
        layers.registered()[nn.Linear] = rule


def test_example_of_an_own_layer():
    result = doctest.testmod(layers)
    assert result.attempted
    assert not result.failed


REFUSED = {
    "scale_grad_by_freq": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "whole batch"),
    "bag_scale_grad_by_freq": (lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True), "whole batch"),
    "batch_norm": (lambda: nn.BatchNorm2d(3), "statistics of the batch"),
    "batch_norm_untracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), "statistics of the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_modules(name):
    make, words = REFUSED[name]
    assert words in layers.rule_for(make()).refuses(make())


CALLS = {
    "linear_wrong_batch": (lambda: nn.Linear(3, 2), (torch.zeros(5, 3),), "expected 4 samples at dimension 0"),
    "linear_unbatched": (lambda: nn.Linear(3, 2), (torch.zeros(3),), "pass batch_dim="),
    "linear_no_tensor": (lambda: nn.Linear(3, 2), ([1.0],), "input: expected a tensor"),
    "conv_unbatched": (lambda: nn.Conv1d(3, 2, 1), (torch.zeros(3, 5),), "add a batch dimension"),
    "conv_wrong_batch": (lambda: nn.Conv1d(3, 2, 1), (torch.zeros(2, 3, 5),), "expected 4 samples"),
    "instance_norm_unbatched": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        (torch.zeros(4, 5, 5),),
        "add a batch dimension",
    ),
    "embedding_positions": (lambda: nn.Embedding(9, 2), (torch.arange(9),), "expected 4 samples"),
    "bag": (lambda: nn.EmbeddingBag(9, 2), (torch.arange(9), torch.tensor([0, 3])), "got 2"),
    "bag_rest": (
        lambda: nn.EmbeddingBag(9, 2, include_last_offset=True),
        (torch.arange(9), torch.tensor([0, 1, 2, 3, 7])),
        "expected the last one to be the number of indices, 9, got 7",
    ),
    "batch_norm": (lambda: nn.BatchNorm1d(3), (torch.zeros(4, 3),), "BatchNorm1d normalises"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (torch.zeros(4, 5, 4),) * 3, r"query: expected \[T, 4"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), (torch.zeros(4, 3), torch.zeros(2, 3)), "expected 4 samples"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_cannot_be_measured(name):
    make, arguments, words = CALLS[name]
    module = make()
    with pytest.raises(ValueError, match=words):
        layers.rule_for(module).save(module, arguments, {}, Batch(4))


def test_packed_rows_have_no_space():
    module = nn.Conv1d(3, 2, 1)
    with pytest.raises(ValueError, match="space cannot be packed"):
        layers.rule_for(module).save(module, (torch.zeros(4, 3, 5),), {}, Batch(4, offsets=torch.tensor([0, 1, 4])))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_by_offsets(mode, last):
    torch.manual_seed(0)
    module = nn.EmbeddingBag(5, 3, mode=mode, include_last_offset=last, padding_idx=1).double()
    ids, starts = torch.randint(5, (11,)), torch.tensor([0, 4, 4, 11] if last else [0, 4, 4])
    y = module(ids, starts)
    g = torch.randn_like(y)
    rule = layers.rule_for(module)
    saved, extra = rule.save(module, (ids,), {"offsets": starts}, Batch(3))
    got = rule.factors(module, g, extra, *saved)["weight"].norms_sq()
    want = [torch.autograd.grad(y[b] @ g[b], module.weight, retain_graph=True)[0].square().sum() for b in range(3)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=0)
