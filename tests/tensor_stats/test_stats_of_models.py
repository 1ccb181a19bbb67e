"""Bounds of attention logits, routers and logits: against what is computed inside, and what is not found is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipcore import TensorStats
from lipcore.metric import MetricResult

HEADS, SIZE, TOKENS = 4, 8, 6


class Attention(nn.Module):
    """Attention that keeps its largest logit per head; keys have `key_heads` heads."""

    def __init__(
        self, names: tuple[str, str], key_heads: int = HEADS, norm: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.names, self.key_heads, self.num_heads = names, key_heads, HEADS
        if names[0] == names[1]:
            self.add_module(names[0], nn.Linear(width, 3 * width))
        else:
            self.add_module(names[0], nn.Linear(width, width))
            self.add_module(names[1], nn.Linear(width, key_heads * SIZE))
        if norm:
            self.q_norm, self.k_norm = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
            self.head_dim = SIZE
        if scale is not None:
            self.scaling = scale
        self.out, self.factor = nn.Linear(width, width), SIZE**-0.5 if scale is None else scale
        self.largest: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.names[0] == self.names[1]:
            q, k, _ = getattr(self, self.names[0])(x).chunk(3, dim=-1)
        else:
            q, k = (getattr(self, name)(x) for name in self.names)
        q, k = q.unflatten(-1, (HEADS, SIZE)), k.unflatten(-1, (-1, SIZE))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(HEADS // self.key_heads, 1)
        exact = q.norm(dim=-1).amax((0, 2)) * k.norm(dim=-1).amax((0, 2)) * self.factor
        logits = q @ k.mT * self.factor
        assert (logits.abs().amax((0, 2, 3)) <= exact * (1 + 1e-6)).all()
        self.largest.append(exact.detach())
        return self.out((logits.softmax(-1) @ k).transpose(1, 2).flatten(2))


class CausalSelfAttention(Attention):
    """A fused projection that is known by the names of class and module."""


def trained(
    model: nn.Module, steps: int = 2, x: Callable[[], Any] = lambda: torch.randn(3, TOKENS, HEADS * SIZE), **wishes: Any
) -> tuple[MetricResult, str]:
    with TensorStats(model, every_steps=1, parameters=False, gradients=False, outputs=False, **wishes) as stats:
        for _ in range(steps):
            model(x()).float().square().mean().backward()
            stats.update()
        return stats.compute(), repr(stats.plan())


CASES: dict[str, tuple[Callable[[], Attention], Any]] = {
    "by name": (lambda: Attention(("q_proj", "k_proj")), "auto"),
    "few heads of keys": (lambda: Attention(("query", "key"), key_heads=2), "auto"),
    "norms": (lambda: Attention(("q_proj", "k_proj"), key_heads=2, norm=True), "auto"),
    "scale": (lambda: Attention(("to_q", "to_k"), scale=0.3), "auto"),
    "fused by name": (lambda: CausalSelfAttention(("c_attn", "c_attn")), "auto"),
    "named": (lambda: Attention(("a", "b")), {"1": ("a", "b", HEADS)}),
    "named with a scale": (lambda: Attention(("a", "b"), scale=2.0), {"*1": ("a", "b", HEADS, 2.0)}),
    "named and fused": (lambda: Attention(("all", "all")), {"1": ("all", HEADS)}),
    "named norms": (lambda: Attention(("a", "b"), norm=True), {"1": ("q_norm", "k_norm", HEADS)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_of_every_head(case: str) -> None:
    make, choice = CASES[case]
    model = nn.Sequential(nn.Linear(HEADS * SIZE, HEADS * SIZE), make())
    result, plan = trained(model, attention=choice)
    exact = torch.stack(model[1].largest)
    for head in range(HEADS):
        found = result.attention_bound[f"1[{head}]"]
        assert found.max.value == pytest.approx(exact[:, head].max().item(), rel=1e-5)
        assert found.mean.value == pytest.approx(exact[:, head].mean().item(), rel=1e-5)
        assert (found.max.label, found.max.count) == ("heuristic" if choice == "auto" else "one-sided", 2)
    assert result.attention_bound["1"].max.value == pytest.approx(exact.max().item(), rel=1e-5)
    assert f"of {HEADS} heads" in plan
    assert "attention_unseen" not in result.details


class Learned(Attention):
    def __init__(self) -> None:
        super().__init__(("q_proj", "k_proj"))
        self.scale = nn.Parameter(torch.ones(HEADS))


class Normed(Attention):
    def __init__(self) -> None:
        super().__init__(("q_proj", "k_proj"))
        self.my_q_norm = nn.LayerNorm(SIZE)


class Silent(Attention):
    def __init__(self) -> None:
        super().__init__(("q_proj", "k_proj"))
        del self.num_heads


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "nn.MultiheadAttention projects inside one function"),
        (Learned, "its scale is a Parameter; name it with the number"),
        (Normed, "queries or keys go through 'my_q_norm'; name what returns them"),
        (Silent, "it does not say how many heads it has; name it: attention={'attn': ('q_proj', 'k_proj', <heads>)}"),
    ],
)
def test_what_is_not_sure_is_not_measured(make: Callable[[], nn.Module], words: str) -> None:
    model = nn.ModuleDict({"attn": make()})
    holder = nn.Module()
    holder.attn = model["attn"]
    holder.forward = lambda x: x
    stats = TensorStats(holder, attention="auto")
    assert f"attention   attn: not measured: {words}" in repr(stats.plan())
    stats.close()


def test_a_router_that_does_not_say_its_choice_is_not_measured() -> None:
    model = nn.Sequential(nn.Identity())
    model[0].gate, model[0].experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    stats = TensorStats(model, router="auto")
    words = "it does not say to how many experts a token goes; name it: router={'0.gate': <experts per token>}"
    assert f"0.gate: not measured: {words}" in repr(stats.plan())
    stats.close()


def test_nothing_by_these_names_is_said() -> None:
    stats = TensorStats(nn.Linear(2, 2), attention="auto", router="auto")
    assert repr(stats.plan()).count("not measured: no module was found by name") == 2
    stats.close()


def test_outputs_that_do_not_fit_are_said() -> None:
    model = nn.Sequential(Attention(("a", "b")))
    result, plan = trained(model, attention={"0": ("a", "b", 5)})
    why = "'0.a' returns 32 features, which 5 heads do not share alike"
    assert result.details["attention_unseen"] == {"0": why}
    assert "attention_bound" not in result
    assert f"0: {why}" in plan


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"attention": "always"}, "attention: expected None, 'auto' or a dict"),
        ({"attention": {"none": ("a", "b", 2)}}, "attention: the model has no module 'none'; it has '0'"),
        ({"attention": {"0": ("a", "c", 2)}}, "attention: '0' has no module 'c'; it has 'a', 'b', 'out'"),
        ({"attention": {"0": ("a", "b")}}, r"attention: expected of '0' \(queries, keys, heads\)"),
        ({"attention": {"0": ("a", "b", 0)}}, "attention: expected of '0'"),
        ({"attention": {"0": ("a", "b", 2, -1.0)}}, "attention: expected of '0'"),
        ({"router": "always"}, "router: expected None, 'auto' or a dict"),
        ({"router": {"none": 1}}, "router: the model has no module 'none'"),
        ({"router": {"0.a": 99}}, "router: expected of '0.a' 1 to 32 experts per token, got 99"),
        ({"router": {"0": 1}}, "router: '0' is a Attention, not a linear layer to experts"),
        ({"logits": "none"}, "logits: the model has no module named 'none'"),
        ({"logits": 3}, "logits: expected True, False or the name of a module, got int"),
    ],
)
def test_what_is_refused(wishes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        TensorStats(nn.Sequential(Attention(("a", "b"))), **wishes)


# ---- routers and logits


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(5, 3), nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), 2
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        self.seen.append(logits.detach())
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        return (weights.unsqueeze(-1) * outputs.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, 5))).sum(-2)


@pytest.mark.parametrize("choice", ["auto", {"*.gate": 2}])
def test_shares_and_entropies_of_a_router(choice: Any) -> None:
    model = nn.Sequential(Mixture())
    result, _ = trained(model, x=lambda: torch.randn(2, 6, 5), router=choice)
    logits = torch.cat([seen.flatten(0, 1) for seen in model[0].seen])
    chosen = logits.topk(2, dim=1).indices.flatten().bincount(minlength=3)
    shares = (chosen / chosen.sum()).tolist()
    for expert in range(3):
        assert result.router_share[f"0.gate[{expert}]"].mean.value == pytest.approx(shares[expert])
    found = result.router_entropy["0.gate"]
    assert found.tokens.value == pytest.approx(
        torch.distributions.Categorical(logits=logits).entropy().mean().item(), rel=1e-5
    )
    assert found.shares.value == pytest.approx(-sum(s * math.log(s) for s in shares if s))
    assert result.router_share["0.gate"].max.value == pytest.approx(max(shares))
    assert (found.tokens.count, found.tokens.label) == (24, "heuristic" if choice == "auto" else "exact")


def test_a_router_of_another_kind_is_said() -> None:
    model = Mixture()
    model.gate = nn.Sequential(nn.Linear(5, 3))
    stats = TensorStats(nn.Sequential(model), router="auto")
    assert "0.gate: not measured: a Sequential may return something else than logits; name it" in repr(stats.plan())
    stats.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logsumexp(dtype: torch.dtype) -> None:
    model, seen = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 7)).to(dtype), []
    model.register_forward_hook(lambda m, a, out: seen.append(out.detach().double()))
    result, _ = trained(model, x=lambda: torch.randn(2, 6, 5, dtype=dtype), logits=True)
    values = torch.cat([logits.logsumexp(-1).flatten() for logits in seen])
    found = result.logsumexp["(model)"]
    assert found.mean.value == pytest.approx(values.mean().item(), rel=1e-5)
    assert found.max.value == pytest.approx(values.max().item(), rel=1e-5)
    assert found.max.count == 24
    result, _ = trained(model, x=lambda: torch.full((2, 5), math.inf, dtype=dtype), logits="0")
    assert result.logsumexp_nonfinite["0"].sum.value == 4
    assert "logsumexp" not in result
    result, _ = trained(nn.Sequential(nn.Linear(5, 1)), x=lambda: torch.randn(2, 5), logits=True)
    assert "are not logits of classes" in result.details["logits_unseen"]["(model)"]
