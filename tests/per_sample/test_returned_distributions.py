"""Models that return distributions (policies) or objects of a class of their own: their tensors are attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from few import few
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms
from lipcore.models.outputs import tensors_of

B, C = 6, 3
Losses = Callable[[Any, Tensor, Tensor], Tensor]


class Policy(nn.Module):
    """A model with parameters of its own, which no rule is for."""

    def __init__(self, returns: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.returns = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C)), returns
        self.way, self.scale = nn.Parameter(torch.randn(5, C)), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Any:
        return self.returns(self.body(x) + (x @ self.way) * self.scale, self.scale.exp())


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.name = logits, "answer"


class Slots:
    __slots__ = ("__logits", "name")

    def __init__(self, logits: Tensor) -> None:
        self.__logits, self.name = logits, "slots"

    @property
    def logits(self) -> Tensor:
        return self.__logits


class Wider(Slots):
    __slots__ = ("more",)


class Acts:
    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def log_prob(self, chosen: Tensor) -> Tensor:
        return self.policy.log_prob(chosen)  # type: ignore[no-any-return]


@dataclass
class Answers:
    policy: Any
    value: Tensor


def of_logits(answer: Any, chosen: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(answer.logits, chosen, reduction="none")


def of_action(policy: Any, chosen: Tensor, _: Tensor) -> Tensor:
    return -policy.log_prob(chosen)  # type: ignore[no-any-return]


def of_point(policy: Any, _: Tensor, point: Tensor) -> Tensor:
    return -policy.log_prob(point)  # type: ignore[no-any-return]


def of_both(returned: Any, chosen: Tensor, _: Tensor) -> Tensor:
    policy, value = returned
    found: Tensor = value.square() - policy.log_prob(chosen)
    return found


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Losses]] = {
    "policy and value": (lambda h, _: (distributions.Categorical(logits=h), h.sum(1)), of_both),
    "object of a policy, and value": (lambda h, _: (Acts(distributions.Categorical(logits=h)), h.sum(1)), of_both),
    "dataclass of such an object": (
        lambda h, _: Answers(Acts(distributions.Categorical(logits=h)), h.sum(1)),
        lambda answers, chosen, point: of_both((answers.policy, answers.value), chosen, point),
    ),
    "object": (lambda h, _: Answer(h), of_logits),
    "slots": (lambda h, _: Slots(h), of_logits),
    "slots of a base class, beside": (lambda h, _: (Wider(h), h.sum(1)), lambda found, *y: of_logits(found[0], *y)),
    "namespace": (lambda h, _: SimpleNamespace(logits=h), of_logits),
    "categorical": (lambda h, _: distributions.Categorical(logits=h), of_action),
    "probabilities": (lambda h, _: distributions.Categorical(probs=h.softmax(-1)), of_action),
    "normal": (lambda h, s: distributions.Independent(distributions.Normal(h, s), 1), of_point),
    "squashed": (
        lambda h, s: distributions.TransformedDistribution(
            distributions.Independent(distributions.Normal(h, s), 1), [distributions.TanhTransform()]
        ),
        lambda policy, _, point: -policy.log_prob(point.tanh() * 0.9),
    ),
}


@pytest.mark.parametrize("name", few(CASES, 2))
def test_norms_of_what_is_in_it(name: str) -> None:
    returns, losses = CASES[name]
    torch.manual_seed(0)
    model = Policy(returns)
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(3):
            given = torch.randn(B, 5), torch.randint(C, (B,)), torch.randn(B, C)
            losses(model(given[0]), *given[1:]).mean().backward()
            expected, double = [], copy.deepcopy(model).double()
            for i in range(B):
                x, chosen, point = (tensor[i : i + 1] for tensor in given)
                loss = losses(double(x.double()), chosen, point.double()).sum()
                gradients = torch.autograd.grad(loss, list(double.parameters()))
                expected.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
            torch.testing.assert_close(norms.per_sample, torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
            assert not norms.unproved
        assert not norms.coverage().uncovered


def test_what_is_without_the_batch_is_refused_with_the_remedy() -> None:
    model = Policy(lambda h, scale: distributions.MultivariateNormal(h, torch.diag_embed(scale)))
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            (-model(torch.randn(B, 5)).log_prob(torch.randn(B, C))).mean().backward()
        with pytest.raises(ValueError, match=r"'scale'.*return it expanded over the samples"):
            _ = norms.per_sample


def test_caches_are_looked_into_only_where_nothing_else_is_returned() -> None:
    class KeyCache(SimpleNamespace):
        pass

    x, cache, other = torch.ones(2), KeyCache(keys=torch.zeros(3)), SimpleNamespace(keys=torch.zeros(3))
    assert [each.shape for each in tensors_of({"logits": x, "cache": cache})] == [(2,)]
    assert [each.shape for each in tensors_of({"logits": x, "other": other})] == [(2,), (3,)]
    assert [each.shape for each in tensors_of({"cache": cache})] == [(3,)]
    loop = SimpleNamespace(x=x)
    loop.itself = loop
    assert [each is x for each in tensors_of(loop)] == [True]
    assert not list(tensors_of([nn.Linear(2, 2), "text", None, int, 3]))
    many = SimpleNamespace(x=x, data=[SimpleNamespace(y=torch.zeros(1)) for _ in range(10_000)])
    assert 1 < len(list(tensors_of(many))) < 1000  # this is asked in every pass

    class Missing(dict[str, Any]):
        def items(self) -> Any:
            raise KeyError("a value that is missing")

    assert list(tensors_of((x, SimpleNamespace(settings=Missing())))) == [x]
    named = SimpleNamespace(names=["a"] * 1000, logits=x)
    assert [each is x for each in tensors_of(named)] == [True]
    assert len(list(tensors_of(SimpleNamespace(found=[x + i for i in range(600)])))) == 600
