"""Modules that compute what a rule knows are recognised by what they compute, and others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from per_sample_oracle import assert_norms, norms_sq, samples_of, weighted_sum
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lipcore import PerSampleGradNorms
from lipcore.layers import register, registered, registry
from lipcore.layers.alike import LayerNormAlike, LinearAlike, RMSNormAlike, TransposedLinear, rule_alike

Forward = Callable[[nn.Module, Tensor], Tensor]


class Own(nn.Module):
    """A module with a weight, perhaps a bias, and any forward pass."""

    eps_of_the_class = 1e-6

    def __init__(self, forward: Forward, shape: tuple[int, ...], bias: int = 0, **attributes: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        if bias:
            self.bias = nn.Parameter(torch.randn(bias))
        self.way = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def layer(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


KNOWN: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "rms": (lambda: Own(lambda m, x: m.weight * rms(x, m.variance_epsilon), (6,), variance_epsilon=1e-4), RMSNormAlike),
    "rms, eps in the code": (lambda: Own(lambda m, x: rms(x, 1e-6) * m.weight, (6,)), RMSNormAlike),
    "rms, 1 + w": (lambda: Own(lambda m, x: (1 + m.weight) * rms(x, m.eps), (6,), eps=1e-5), RMSNormAlike),
    "rms in float32": (lambda: Own(lambda m, x: (m.weight * rms(x.float(), 1e-5)).type_as(x), (6,)), RMSNormAlike),
    "rms with two numbers": (lambda: Own(lambda m, x: m.weight * rms(x, m.b), (6,), a=0.5, b=1e-3), RMSNormAlike),
    "layer norm": (lambda: Own(lambda m, x: m.weight * layer(x, 1e-5) + m.bias, (6,), 6), LayerNormAlike),
    "layer norm without bias": (lambda: Own(lambda m, x: m.weight * layer(x, m.e), (6,), e=1e-3), LayerNormAlike),
    "linear": (lambda: Own(lambda m, x: x @ m.weight.T + m.bias, (4, 6), 4), LinearAlike),
    "linear without bias": (lambda: Own(lambda m, x: torch.einsum("...i,oi->...o", x, m.weight), (4, 6)), LinearAlike),
    "transposed": (lambda: Own(lambda m, x: x @ m.weight + m.bias, (6, 4), 4), TransposedLinear),
    "transposed, square": (lambda: Own(lambda m, x: x @ m.weight, (6, 6)), TransposedLinear),
}

UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "an eps that stands nowhere": lambda: Own(lambda m, x: m.weight * rms(x, 3e-7), (6,)),
    "squared weight": lambda: Own(lambda m, x: m.weight**2 * rms(x, 1e-6), (6,)),
    "scaled weight": lambda: Own(lambda m, x: 0.1 * m.weight * rms(x, 1e-6), (6,)),
    "a norm that is clamped": lambda: Own(lambda m, x: m.weight * rms(x, 1e-6).clamp(-1, 1), (6,)),
    "over all positions": lambda: Own(lambda m, x: m.weight * x / x.pow(2).mean((1, 2), keepdim=True).sqrt(), (6,)),
    "unbiased variance": lambda: Own(lambda m, x: m.weight * x / x.std(-1, keepdim=True), (6,)),
    "no norm": lambda: Own(lambda m, x: m.weight * x, (6,)),
    "an activation": lambda: Own(lambda m, x: (x @ m.weight.T).relu(), (4, 6)),
    "scaled linear": lambda: Own(lambda m, x: 2 * x @ m.weight.T, (4, 6)),
    "linear with a scaled bias": lambda: Own(lambda m, x: x @ m.weight.T + 0.5 * m.bias, (4, 6), 4),
    "noise": lambda: Own(lambda m, x: x @ m.weight.T + torch.randn(4), (4, 6)),
    "mixes": lambda: Own(lambda m, x: x.flip(0) @ m.weight.T, (4, 6)),
    "raises": lambda: Own(lambda m, x: m.nothing(x), (4, 6)),
    "no tensor": lambda: Own(lambda m, x: (x @ m.weight.T, None), (4, 6)),  # type: ignore[arg-type,return-value]
    "three dimensions": lambda: Own(lambda m, x: x @ m.weight[0].T, (1, 4, 6)),
    "complex": lambda: _complex(),
    "a type with a rule": lambda: nn.Linear(6, 4),
    "parametrized": lambda: parametrizations.weight_norm(KNOWN["linear"][0]()),
    "with a buffer": lambda: _with_buffer(),
    "replaced on the object": lambda: _replaced(),
}


def _complex() -> nn.Module:
    module = KNOWN["linear"][0]()
    module.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
    return module


def _with_buffer() -> nn.Module:
    module = KNOWN["linear"][0]()
    module.register_buffer("mask", torch.ones(4))
    return module


def _replaced() -> nn.Module:
    module = KNOWN["linear"][0]()
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("way", [{"max_replay_bytes": 0}, {"fused": True}], ids=str)
def test_what_a_rule_knows_is_recognised(name: str, way: dict[str, object]) -> None:
    build, kind = KNOWN[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), build(), nn.Tanh())
    assert type(rule_alike(model[1])) is kind
    x = torch.randn(3, 4, 5)
    expected = norms_sq(model, samples_of((x,), 3), weighted_sum)
    with PerSampleGradNorms(model, loss_reduction="sum", **way) as metric:  # type: ignore[arg-type]
        weighted_sum(model(x)).backward()
        assert_norms(metric, expected)
        assert not metric.unproved


@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_the_plan_of_a_compiled_one_knows_its_lengths(name: str) -> None:
    """Whose rule is known before the first pass, unlike without torch.compile."""
    model = torch.compile(nn.Sequential(KNOWN[name][0]()), backend="eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        assert "Own: weight, bias, Gram up to 2 positions, else direct" in str(metric.plan())


def test_the_plan_of_a_class_with_the_rule_of_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    kind = type("Projection", (Own,), {})
    register(kind, registered()[nn.Linear])
    model = nn.Sequential(kind(lambda m, x: x @ m.weight.T, (4, 6)))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        assert "Projection: weight, Gram or direct" in str(metric.plan())


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_computes_something_else_is_not(name: str) -> None:
    assert rule_alike(UNKNOWN[name]()) is None


def test_a_trial_leaves_no_trace() -> None:
    module = Own(lambda m, x: x @ m.weight.T + m.bias, (4, 6), 4)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    before, weight, state = dict(vars(module)), module.weight, torch.get_rng_state()
    assert rule_alike(module) is not None
    assert not calls
    assert module.weight is weight
    assert vars(module) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_with_more_than_the_trial_had_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return self.weight * rms(x if gate is None else x * gate, self.eps)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(5, 6), Gated()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.norm(x, x.sigmoid())  # type: ignore[no-any-return]

    model = Model()
    with pytest.raises(ValueError, match=r"module 'norm' \(Gated\): expected one tensor, as in the trial"):
        with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                model(torch.randn(3, 5)).square().sum().backward()
