"""What a rule declares about its type of layer, beside its factors; and that nothing else keeps such tables."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import lipcore
from lipcore import PerSampleGradNorms, layers

EITHER = ("gram", "direct")
POSITIONS = "sums over positions"
INDICES = "sums over equal indices"
DECLARED = {
    nn.Linear: ((*EITHER, "estimate"), ""),
    nn.Bilinear: (EITHER, ""),
    nn.Conv1d: (EITHER, ""),
    nn.Conv2d: (EITHER, ""),
    nn.Conv3d: (EITHER, ""),
    nn.ConvTranspose1d: (EITHER, ""),
    nn.ConvTranspose2d: (EITHER, ""),
    nn.ConvTranspose3d: (EITHER, ""),
    nn.MultiheadAttention: (EITHER, ""),
    nn.LayerNorm: ((), POSITIONS),
    nn.RMSNorm: ((), POSITIONS),
    nn.GroupNorm: ((), POSITIONS),
    nn.InstanceNorm1d: ((), POSITIONS),
    nn.InstanceNorm2d: ((), POSITIONS),
    nn.InstanceNorm3d: ((), POSITIONS),
    nn.BatchNorm1d: ((), POSITIONS),
    nn.BatchNorm2d: ((), POSITIONS),
    nn.BatchNorm3d: ((), POSITIONS),
    nn.SyncBatchNorm: ((), POSITIONS),
    nn.PReLU: ((), POSITIONS),
    nn.Embedding: ((), INDICES),
    nn.EmbeddingBag: ((), INDICES),
}


def named(kind: type) -> str:
    return kind.__name__


def test_every_type_of_torch_with_a_rule_is_in_the_table() -> None:
    torchs = {kind for kind in layers.registered() if kind.__module__.startswith("torch.")}
    assert torchs == set(DECLARED)


@pytest.mark.parametrize("kind", DECLARED, ids=named)
def test_methods_and_the_one_way(kind: type[nn.Module]) -> None:
    rule = layers.registered()[kind]
    assert (rule.methods, rule.how) == DECLARED[kind]
    assert bool(rule.methods) != bool(rule.how)


@pytest.mark.parametrize("kind", DECLARED, ids=named)
def test_the_exceptions(kind: type[nn.Module]) -> None:
    rule = layers.registered()[kind]
    assert rule.may_mix_samples == ("BatchNorm" in kind.__name__)
    assert rule.in_place_after == (kind is not nn.MultiheadAttention)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_only_torchs_own_linear_is_fused() -> None:
    rule = layers.registered()[nn.Linear]
    assert rule.fuses(nn.Linear(2, 3))
    assert not rule.fuses(Doubled(2, 3))
    assert not any(rule.fuses(nn.Linear(2, 3)) for kind, rule in layers.registered().items() if kind is not nn.Linear)


def test_features_of_an_output() -> None:
    assert layers.registered()[nn.Linear].feature_dims(nn.Linear(2, 3)) == 1
    assert layers.registered()[nn.LayerNorm].feature_dims(nn.LayerNorm((2, 3))) == 2


class Scale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((features,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class ScaleRule(layers.Rule):
    def save(self, module, arguments, keywords, batch):  # type: ignore[no-untyped-def]
        return (arguments[0],), batch

    def factors(self, module, grad_output, extra, *saved):  # type: ignore[no-untyped-def]
        return {"scale": layers.RowSum(extra.tokens(grad_output), extra.tokens(saved[0]), extra.offsets)}


class DeclaredRule(ScaleRule):
    methods = ()
    how = "sums over rows"


@pytest.fixture
def registered_rule(request: pytest.FixtureRequest) -> layers.Rule:
    layers.register(Scale, request.param, replace=True)
    return request.param


@pytest.mark.parametrize("registered_rule", [ScaleRule()], indirect=True, ids=["bare"])
def test_a_rule_of_ones_own_needs_two_methods_only(registered_rule: layers.Rule) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Scale(4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with PerSampleGradNorms(model, loss_reduction="sum", methods={"1": "gram"}) as norms:  # which it may know, or not
        model(x).square().sum().backward()
        got = norms.per_sample
    one = []
    for row in x:
        model.zero_grad()
        model(row[None]).square().sum().backward()
        one.append(sum(p.grad.double().square().sum() for p in model.parameters()).sqrt())
    torch.testing.assert_close(got, torch.stack(one), rtol=1e-5, atol=0)


def test_a_rule_of_ones_own_names_its_methods() -> None:
    class Quick(ScaleRule):
        methods = ("quick", "exact")

    assert Quick().ways(Scale(4)) == "quick or exact"
    assert layers.registered()[nn.Conv2d].ways(nn.Conv2d(1, 1, 1)) == "Gram or direct, by the sizes"


@pytest.mark.parametrize("registered_rule", [DeclaredRule()], indirect=True, ids=["declared"])
def test_a_rule_of_ones_own_declares_its_one_way(registered_rule: layers.Rule) -> None:
    model = nn.Sequential(Scale(4))
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        assert any("Scale: scale, by sums over rows" in str(line) for line in norms.plan())
    with pytest.raises(ValueError, match="Scale has one way to compute its norms and no choice"):
        PerSampleGradNorms(model, loss_reduction="sum", methods={"0": "gram"})


@pytest.mark.parametrize("folder", ["capture/layers", "per_sample"])
def test_no_other_file_knows_a_type_of_layer(folder: str) -> None:
    """A type that has a rule is named in the file of its rule alone."""
    names = {kind.__name__ for kind in DECLARED} | {"_BatchNorm", "_NormBase", "_ConvNd"}
    for path in sorted((Path(lipcore.__file__).parent / folder).rglob("*.py")):
        found = [n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
        assert not names.intersection(found), (path.name, names.intersection(found))
