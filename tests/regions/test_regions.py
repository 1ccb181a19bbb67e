"""Activation patterns: which piece every unit is on, for every activation, against what the formula says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import Graph
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore.regions import activation_patterns

ACTIVATIONS = {
    "relu": (nn.ReLU(), lambda u: u > 0),
    "relu in place": (nn.ReLU(inplace=True), lambda u: u > 0),
    "leaky": (nn.LeakyReLU(0.1), lambda u: u > 0),
    "prelu": (nn.PReLU(), lambda u: u > 0),
    "relu6": (nn.ReLU6(), lambda u: (u > 0) & (u < 6)),
    "hardtanh": (nn.Hardtanh(-0.2, 0.3), lambda u: (u > -0.2) & (u < 0.3)),
    "threshold": (nn.Threshold(0.1, 0.0), lambda u: u > 0.1),
    "rrelu": (nn.RReLU().eval(), lambda u: u > 0),
}


@pytest.mark.parametrize("width", [1, 7, 8, 9, 65])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bits_are_those_of_the_input_of_the_activation(name: str, width: int) -> None:
    torch.manual_seed(0)
    activation, truth = ACTIVATIONS[name]
    model = nn.Sequential(nn.Linear(3, width), activation, nn.Linear(width, 1))
    x = torch.randn(17, 3) * 5
    patterns = activation_patterns(model, x, batch_size=5)
    (gate,) = patterns.layers
    assert gate.name == "1"
    assert np.array_equal(gate.bits().astype(bool), truth(model[0](x)).numpy())
    assert len(patterns) == 17


BORDERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 0.0),
    "relu in place": (lambda u: F.relu_(u.clone()), 0.0),
    "leaky": (lambda u: F.leaky_relu(u, 0.1), 0.1),
    "prelu": (lambda u: F.prelu(u, torch.tensor([0.3])), 0.3),
    "rrelu": (lambda u: F.rrelu(u, 0.2, 0.4), 0.3),
    "relu6": (F.relu6, 0.0),
    "hardtanh": (lambda u: F.hardtanh(u, -1.0, 2.0), 0.0),
    "threshold": (lambda u: F.threshold(u, 1.0, 0.0), 0.0),
    "clamp": (lambda u: u.clamp(-1.0, 2.0), 0.0),
    "clamp to tensors": (lambda u: torch.clamp(u, torch.tensor(-1.0), torch.tensor([2.0])), 0.0),
    "clamp to a point": (lambda u: u.clamp(1.0, 1.0), 0.0),
    "clamp to nothing": (lambda u: u.clamp(2.0, 1.0), 0.0),
    "clamp from below": (lambda u: u.clamp(min=0.0), 0.0),
    "clamp_min": (lambda u: torch.clamp_min(u, 0.0), 0.0),
    "clamp from above": (lambda u: u.clamp(max=2.0), 0.0),
    "clamp_max": (lambda u: torch.clamp_max(u, 2.0), 0.0),
    "abs": (torch.abs, -1.0),
    "abs in place": (lambda u: u.clone().abs_(), -1.0),
}


@pytest.mark.parametrize("name", BORDERS)
def test_the_slope_of_the_pattern_is_torchs_on_every_border(name: str) -> None:
    function, below = BORDERS[name]
    model = Graph(lambda m, x: function(x))
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 7.0])[:, None].requires_grad_()
    (slopes,) = torch.autograd.grad(function(x).sum(), x)
    (gate,) = activation_patterns(model, x).layers
    bits, second = gate.bits(), gate.second_bits()
    on_zero = second if gate.kind == "fold" and second is not None else np.zeros_like(bits)
    expected = np.where(bits == 1, 1.0, np.where(on_zero == 1, 0.0, below))
    assert np.allclose(expected, slopes.numpy())
    # A region has one affine function: the flat pieces of different height are different regions.
    ids, values = activation_patterns(model, x).region_ids(), function(x).detach().flatten().numpy()
    for region in np.unique(ids):
        offsets = (values - slopes.numpy()[:, 0] * x.detach().numpy()[:, 0])[ids == region]
        assert np.allclose(offsets, offsets[0])


@pytest.mark.parametrize("kind", ["max_pool1d", "adaptive_max_pool1d"])
def test_of_equal_maxima_the_pattern_has_the_one_that_torch_takes(kind: str) -> None:
    model = Graph(lambda m, x: getattr(F, kind)(x, 2))
    x = torch.tensor([[[1.0, 1.0, 0.0, 0.0]], [[0.0, 1.0, 2.0, 2.0]]]).requires_grad_()
    (slopes,) = torch.autograd.grad(getattr(F, kind)(x, 2).sum(), x)
    (gate,) = activation_patterns(model, x).layers
    assert np.array_equal(np.sort(gate.bits(), 1), [row.nonzero().flatten().tolist() for row in slopes[:, 0]])


def test_activations_of_the_same_name_are_told_apart() -> None:
    """One of the model's own, and one of a module that is called "model"."""
    inner = Graph(lambda m, x: m.first(x).relu(), first=nn.Linear(3, 4))
    net = Graph(lambda m, x: m.last(m.model(x)).relu(), model=inner, last=nn.Linear(4, 2))
    patterns = activation_patterns(net, torch.randn(9, 3))
    assert {name: len(share) for name, share in patterns.activity().items()} == {"model": 4, "model#2": 2}
    assert [gate.in_module for gate in patterns.layers] == [True, False]
    assert set(patterns.flipped(patterns)) == {"model", "model#2"}


class Calls(nn.Module):
    """Activations that are not modules, a residual connection and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = F.max_pool1d(F.relu(self.conv(x)), 2).flatten(1)
        u = u + self.mix(u).clamp(min=0)
        return self.head(u.abs())


def test_functions_pooling_and_residuals() -> None:
    torch.manual_seed(0)
    model, x = Calls(), torch.randn(33, 1, 4)
    patterns = activation_patterns(model, x, batch_size=10)
    assert [gate.kind for gate in patterns.layers] == ["step", "index", "step", "fold"]
    inputs = F.relu(model.conv(x)).reshape(33, 4, 2, 2)
    assert np.array_equal(patterns.layers[1].bits() % 2, inputs.argmax(-1).reshape(33, -1).numpy())
    # Two inputs of the same region have the same gradient, on different sides of every kink it changes.
    grid = torch.randn(2000, 1, 4) * 0.5
    gradients = torch.func.vmap(torch.func.grad(lambda p: model(p[None]).sum()))(grid).flatten(1)
    ids = activation_patterns(model, grid).region_ids()
    for region in np.unique(ids):
        rows = gradients[torch.from_numpy(np.flatnonzero(ids == region))]
        assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-5)


def test_counts_churn_and_activity() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([0.0, 1.0, -100.0]))
    x = torch.tensor([[-2.0], [-0.5], [1.0], [2.0]])
    patterns = activation_patterns(model, x)
    assert patterns.regions == 3
    assert patterns.region_ids()[2] == patterns.region_ids()[3] != patterns.region_ids()[0]
    assert patterns.activity()["1"].tolist() == [0.5, 0.75, 0.0]
    with torch.no_grad():
        model[0].bias[0] = -1.5
    later = activation_patterns(model, x)
    assert patterns.churn(later) == 0.25
    assert patterns.flipped(later) == {"1": 1 / 12}
    assert patterns.churn(patterns) == 0
    with pytest.raises(ValueError, match="later: expected patterns of the same 4 inputs"):
        patterns.churn(later.take([0, 1]))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Sigmoid())
    assert "sigmoid" in activation_patterns(model, torch.randn(4, 2)).head
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


REFUSED = {
    "tanh": (nn.Tanh(), "tanh in module '1' is not piecewise linear"),
    "gelu": (nn.GELU(), "gelu in module '1'"),
    "layer norm": (nn.LayerNorm(4), "native_layer_norm in module '1'"),
    "softmax": (nn.Softmax(1), "softmax in module '1'"),
    "batch norm": (nn.BatchNorm1d(4), r"'1' is a BatchNorm1d in train mode.*model.eval\(\)"),
    "dropout": (nn.Dropout(), r"'1' is a Dropout in train mode.*model.eval\(\)"),
    "threshold": (nn.Threshold(0.1, 0.5), "calls threshold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_linear_regions_is_refused_by_name(name: str) -> None:
    module, message = REFUSED[name]
    model = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=message):
        activation_patterns(model, torch.randn(5, 3))


def test_bad_input() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"x: expected shape \[N, ...\] with N >= 1, got \[0, 3\]"):
        activation_patterns(model, torch.empty(0, 3))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        activation_patterns(model, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: it is on cpu, but parameter '0.weight' of the model is on meta"):
        activation_patterns(nn.Sequential(nn.Linear(3, 4, device="meta"), nn.ReLU()), torch.randn(2, 3))
    with pytest.raises(ValueError, match="no ReLU-family activation ran"):
        activation_patterns(nn.Linear(3, 1), torch.randn(2, 3))
    with pytest.raises(ValueError, match="has 6 rows for 2 samples"):
        activation_patterns(
            nn.Sequential(nn.Flatten(0), nn.ReLU(), nn.Unflatten(0, (1, 6)), nn.ReLU()), torch.ones(2, 3)
        )
