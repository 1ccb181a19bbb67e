"""Outputs of the stages of a pipeline: under their prefixes, and together without ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipcore import Monitor, TensorStats
from lipcore.distributed.packed import folded
from lipcore.tensor_stats.rank_part import TensorStatsPart


class Heads(nn.Module):
    """An attention module, as far as projections go."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.num_heads = nn.Linear(8, 8), nn.Linear(8, 8), heads

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x)


class Mixture(nn.Module):
    """A router and its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), 2

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def stage(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).double()


def stepped(model: nn.Module, prefix: str, x: Tensor, **settings: Any) -> tuple[TensorStatsPart, Any]:
    """What a rank offers after one step, and its own numbers."""
    stats = TensorStats(every_steps=1, parameters=False, gradients=False, attention="auto", router="auto", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [stats], prefix=prefix):
        model(x).square().mean().backward()
        optimizer.step()
        part = stats.rank_part()
        assert isinstance(part, TensorStatsPart)
        return part, stats.compute()


def together(*parts: TensorStatsPart) -> Any:
    told = [part.told for part in parts]
    for part in parts:
        part.hear(told)
    assert {part.refused() for part in parts} == {""}
    found = [part.result(folded(lambda: [each.packed() for each in parts])) for part in parts]
    assert len({str(sorted(each.flat("group").items())) for each in found}) == 1  # the same on all ranks
    return found[0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_each_stage_has_names_of_its_own() -> None:
    first = stepped(stage(nn.Linear(8, 8), Heads(2)), "stages.0", torch.randn(5, 8).double())
    second = stepped(
        stage(Mixture(), Heads(4), nn.Linear(8, 3)), "stages.1", torch.randn(5, 8).double() + 10, logits=True
    )
    assert {"stages.0", "stages.0.0", "stages.0.1.q_proj"} <= set(first[1].output)
    found = together(first[0], second[0])
    for _, own in (first, second):
        for level in ("tensor", "group"):
            numbers = {key: number for key, number in own.flat(level).items() if not key.endswith("/total")}
            assert {key: found.flat(level)[key] for key in numbers} == pytest.approx(numbers, rel=1e-9)
    assert set(found.attention_bound) == {
        *(f"stages.0.1[{head}]" for head in range(2)), "stages.0.1",
        *(f"stages.1.1[{head}]" for head in range(4)), "stages.1.1",
    }  # fmt: skip
    assert set(found.router_entropy) == {"stages.1.0.gate"}
    assert found.details["forward_passes"] == 2


def test_replicas_of_a_stage_add_up() -> None:
    x = torch.randn(6, 8).double()
    ranks, whole = [], []
    for i in range(4):
        torch.manual_seed(i // 2)
        model = stage(nn.Linear(8, 8))
        whole.append(float(model(x).detach().mean()))
        ranks.append(stepped(model, f"s{i // 2}", x[3 * (i % 2) : 3 * (i % 2) + 3])[0])
    found = together(*ranks).output
    for i in range(2):
        assert found[f"s{i}.0"].mean.value == pytest.approx(whole[2 * i], rel=1e-12)
        assert found[f"s{i}.0"].mean.count == 48


@pytest.mark.parametrize(
    ("prefixes", "settings", "words"),
    [
        (("s0", "s0"), {"outputs": "1"}, "outputs is ['s0', 's0.1'] on rank 0 and ['s0.1'] on rank 1"),
        (("", ""), {"logits": True}, "extras is [] on rank 0 and [['logits', '(model)', 3, 1, True]] on rank 1"),
        (("", "1"), {}, "rank 0 (prefix '') and rank 1 (prefix '1') both measure '1', and are not ranks of one stage"),
    ],
)
def test_what_does_not_go_together_is_refused(prefixes: Any, settings: Any, words: str) -> None:
    x, nets = torch.randn(5, 8), [nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2)]
    parts = [
        stepped(nets[0], prefixes[0], x, exclude=("0", "2"))[0],
        stepped(nets[1], prefixes[1], x, exclude=("0", "2"), **settings)[0],
    ]
    told = [part.told for part in parts]
    for part in parts:
        part.hear(told)
        assert re.search(re.escape(words), part.refused()), part.refused()
