"""Theorem 2: bounds against the truth on many random networks, and the kernel form against the explicit programme."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
from few import few
from models import Graph
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import Monitor, local_lipschitz
from lipcore.regions import Coverage, Patterns, activation_patterns
from lipcore.regions.kernel import kernel
from lipcore.regions.patterns import PackedGate

linprog = pytest.importorskip("scipy.optimize").linprog


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def explicit(model: nn.Module, x: Tensor, queries: Tensor) -> np.ndarray:
    """min_k sum |k_i| lambda_i s.t. s(q) = S k with every row of the Kronecker product; inf where infeasible."""

    def kron(points: Tensor) -> np.ndarray:
        bits = [gate.bits().astype(float) for gate in activation_patterns(model, points).layers]
        out = bits[0]
        for more in bits[1:]:
            out = (out[:, :, None] * more[:, None, :]).reshape(len(out), -1)
        return out

    columns, index = np.unique(kron(x), axis=0, return_index=True)
    costs = local_lipschitz(model, x[torch.from_numpy(index)]).numpy()
    found = []
    for row in kron(queries):
        both = np.hstack([columns.T, -columns.T])
        result = linprog(np.concatenate([costs, costs]), A_eq=both, b_eq=row, bounds=(0, None), method="highs")
        found.append(result.fun if result.status == 0 else np.inf)
    return np.array(found)


@pytest.mark.parametrize("sizes", [(2, 5, 1), (3, 4, 5, 1), (2, 6, 4, 3, 1)])
@pytest.mark.parametrize("seed", few(range(4), 1))
def test_kernel_form_is_the_explicit_programme(sizes: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp(*sizes).double()
    x, queries = torch.randn(25, sizes[0]).double(), 2 * torch.randn(40, sizes[0]).double()
    result = Coverage(model, x).query(queries)
    truth = explicit(model, x, queries)
    assert np.array_equal(np.isfinite(result.bound), np.isfinite(truth))
    assert np.allclose(result.bound, truth, rtol=1e-6, atol=1e-9)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x).relu()
        return self.head(u + self.mix(u).relu())


MAKERS = {
    "shallow": lambda: mlp(2, 8, 1),
    "deep": lambda: mlp(3, 6, 6, 4, 1),
    "leaky": lambda: mlp(2, 5, 4, 1, activation=nn.LeakyReLU),
    "relu6": lambda: mlp(2, 6, 4, 1, activation=nn.ReLU6),
    "residual": Residual,
    "wide": lambda: mlp(1, 30, 1),
    "pooled": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(6, 1),
    ),
}


@pytest.mark.parametrize("name", few(MAKERS, 1))
def test_bounds_are_never_below_the_truth(name: str) -> None:
    """30 random networks of every kind, 60 points each, near and far."""
    statuses: set[str] = set()
    for seed in range(30):
        torch.manual_seed(seed)
        model = MAKERS[name]().double()
        inputs = 4 if name == "pooled" else next(model.parameters()).shape[1]
        for parameter in model.parameters():
            parameter.data.mul_(3)
        x = torch.randn(20, inputs).double()
        queries = torch.cat([x[:5], torch.randn(35, inputs).double(), 10 * torch.randn(20, inputs).double()])
        result = Coverage(model, x).query(queries)
        truth = local_lipschitz(model, queries).numpy()
        least = truth * (1 - 1e-6) - 1e-9
        for bound in (result.bound, result.relaxed, result.nearest):
            assert (np.isnan(bound) | (bound >= least)).all()
        assert (np.isnan(result.nearest) | (result.relaxed <= result.nearest * (1 + 1e-9))).all()
        train = result.status == "train"
        assert train[:5].all()
        assert np.allclose(result.bound[train], truth[train])
        assert np.isinf(result.bound[result.status == "uncovered"]).all()
        assert (result.k[result.status == "uncovered"] == 0).all()
        statuses |= set(result.status)
    assert {"train", "uncovered"} <= statuses
    assert "combination" in statuses or name != "shallow"


def test_status_without_solving_is_the_same() -> None:
    torch.manual_seed(0)
    model, x, queries = mlp(2, 8, 1), torch.randn(30, 2), 3 * torch.randn(200, 2)
    coverage = Coverage(model, x)
    assert np.array_equal(coverage.query(queries, solve=False).status, coverage.query(queries).status)
    assert "combination" in coverage.query(queries).status
    assert coverage.rank <= min(8, coverage.regions)


def test_a_pattern_that_is_off_everywhere_is_exact() -> None:
    model = mlp(1, 2, 1)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    result = Coverage(model, torch.ones(1, 1)).query(-torch.ones(1, 1))
    assert result.bound.tolist() == result.relaxed.tolist() == [0.0]
    assert Coverage(model, -torch.ones(1, 1)).query(torch.ones(1, 1)).status.tolist() == ["uncovered"]


def test_refusals() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="head.*sigmoid.*part before it"):
        Coverage(nn.Sequential(*mlp(2, 3, 1), nn.Sigmoid()), x)
    with pytest.raises(ValueError, match="one value per sample is needed"):
        Coverage(mlp(2, 3, 2), x)
    with pytest.raises(ValueError, match="N >= 1"):
        Coverage(mlp(2, 3, 1), torch.empty(0, 2))
    coverage = Coverage(mlp(2, 3, 2), x, output=1)
    assert np.isnan(coverage.query(9 * x).relaxed[coverage.query(9 * x).status == "uncovered"]).all()


class Exchange(nn.Module):
    """Two nodes that hear of one another, by indices that are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.register_buffer("ends", torch.tensor([[0, 1], [1, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.reshape(-1, 2, 2)).relu()
        heard = torch.zeros_like(h).index_add(1, self.ends[1], h[:, self.ends[0]])
        return self.head((h - heard).relu()).sum((1, 2))


class Bends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).clamp(-0.5, 0.7)
        h = h + F.threshold(self.mix(h), 0.1, 0.0)
        return self.head(h.abs() + F.relu6(h))


FUNCTIONS = {
    "indices": (Exchange, None),
    "clamp, threshold, abs": (Bends, None),
    "difference": (lambda: mlp(4, 4, 2), lambda z: z[:, 0] - z[:, 1]),
    "margin": (lambda: mlp(4, 4, 2), lambda z: (z[:, 0] - z[:, 1]).abs()),
    "past an activation": (lambda: mlp(4, 4, 2), lambda z: z[:, 0].relu() + z[:, 1]),
}


@pytest.mark.parametrize("name", few(FUNCTIONS, 2))
def test_bounds_of_functions_and_chosen_outputs(name: str) -> None:
    make, output = FUNCTIONS[name]
    statuses: set[str] = set()
    for seed in range(10):
        torch.manual_seed(seed)
        model = make().double()
        for parameter in model.parameters():
            parameter.data.mul_(2.5)
        x = torch.randn(40, 4).double()
        queries = torch.cat([x[:5], torch.randn(30, 4).double(), 8 * torch.randn(20, 4).double()])
        result = Coverage(model, x, output=output).query(queries)
        truth = local_lipschitz(model, queries, output=output).numpy()
        for bound in (result.bound, result.relaxed, result.nearest):
            assert (np.isnan(bound) | (bound >= truth * (1 - 1e-6) - 1e-9)).all()
        train = result.status == "train"
        assert np.allclose(result.bound[train], truth[train])
        statuses |= set(result.status)
    assert {"train", "combination"} <= statuses


def test_labels_say_which_bounds_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 2)
    found = Coverage(mlp(2, 8, 1), x).query(torch.cat([x[:3], 9 * x]))
    assert (found.labels[:3] == "exact").all()
    assert ((found.labels == "exact") == (found.status == "train")).all()
    assert found.to_dict()["labels"] == found.labels.tolist()
    assert set(found.labels) == {"exact", "one-sided"}


def step(model: nn.Module) -> None:
    """One step of an optimizer that leaves version counters alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()


CHANGES = {
    "fused step": step,
    "swapped entries": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(0)),
    "buffer": lambda m: m[1].running_mean.add_(1),
    "data replaced": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2),
    "an activation": lambda m: setattr(m, "2", nn.LeakyReLU(0.5)),
    "a setting": lambda m: setattr(m[1], "eps", 0.1),
    "a hook": lambda m: m[2].register_forward_hook(lambda module, given, output: 2 * output),
    "more of it": lambda m: m.append(nn.Sequential()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changed_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)).eval()
    x = torch.randn(9, 2)
    coverage = Coverage(model, x)
    coverage.query(x)
    CHANGES[name](model)
    with pytest.raises(
        ValueError, match=r"it changed since this Coverage was built \((\d parameters|its modules, ).*build it anew"
    ):
        coverage.query(x)


def test_a_monitor_is_no_change() -> None:
    model, x = mlp(2, 6, 1), torch.randn(9, 2)
    coverage = Coverage(model, x)
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        assert coverage.query(x).status.tolist() == ["train"] * 9


def test_another_way_through_the_model_is_refused() -> None:
    """The same parameters and settings, and an activation of the same width."""
    model = Graph(lambda m, x: m.last(F.relu(m.first(x))), first=nn.Linear(2, 6), last=nn.Linear(6, 1))
    x = torch.randn(9, 2)
    coverage = Coverage(model, x)
    model.rule = lambda m, x: m.last(F.leaky_relu(m.first(x)))
    with pytest.raises(ValueError, match=r"expected the activations of the training inputs, .*'step'.*, got .*'leaky'"):
        coverage.query(x)


@pytest.mark.ci
def test_on_a_border_the_constant_is_that_of_its_region() -> None:
    """Of a batch of one, whose product rounds otherwise than that of several, and exactly on kinks."""
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = mlp(20, 16, 1), torch.randn(17, 20)
        weight, bias, unit = model[0].weight.detach(), model[0].bias.detach(), torch.randint(16, (17,))
        away = ((x * weight[unit]).sum(1) + bias[unit]) / weight[unit].square().sum(1)
        x = x - away[:, None] * weight[unit]
        coverage = Coverage(model, x, batch_size=8)
        bits = activation_patterns(model, x, batch_size=8).take(coverage.samples).layers[0].bits()
        slopes = (model[2].weight.detach().double().numpy() * bits) @ weight.double().numpy()
        assert np.allclose(np.linalg.norm(slopes, axis=1), coverage.local_lipschitz, rtol=1e-5)


KINKS = {
    "abs": lambda m, x: m.last(m.first(x).abs()),
    "clamp": lambda m, x: m.last(m.first(x).clamp(0.0, 1.0)),
    "clamp and skip": lambda m, x: m.last(m.first(x).clamp(max=0.0)) + x.sum(1, keepdim=True),
    "two folds": lambda m, x: m.last(m.mix(m.first(x).abs()).abs()),
}


@pytest.mark.parametrize("name", few(KINKS, 1))
def test_bounds_from_points_on_kinks(name: str) -> None:
    """Whole numbers, so that many points lie exactly on one."""
    statuses: set[str] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        parts = {"first": nn.Linear(2, 3), "mix": nn.Linear(3, 3), "last": nn.Linear(3, 1)}
        model = Graph(KINKS[name], **parts).double()
        for parameter in model.parameters():
            parameter.data.copy_(torch.randint(-1, 2, parameter.shape))
        x, queries = torch.randint(-2, 3, (20, 2)).double(), torch.randint(-4, 5, (60, 2)).double()
        found, truth = Coverage(model, x).query(queries), local_lipschitz(model, queries).numpy()
        for bound in (found.bound, found.relaxed, found.nearest):
            assert (np.isnan(bound) | (bound >= truth * (1 - 1e-6) - 1e-9)).all()
        train = found.status == "train"
        assert np.allclose(found.bound[train], truth[train])
        statuses |= set(found.status)
    assert {"train", "combination"} <= statuses


def test_only_what_the_output_adds_makes_a_chain_multi_affine() -> None:
    layers = OrderedDict(first=nn.Linear(2, 4), model2=nn.ReLU(), model=nn.Linear(4, 4), models=nn.ReLU())
    chain, x = nn.Sequential(OrderedDict(**layers, last=nn.Linear(4, 2))), torch.randn(20, 2)
    assert "chain" in repr(Coverage(chain, x, output=lambda z: z[:, 0]))
    assert "multi-affine" in repr(Coverage(chain, x, output=lambda z: z[:, 0].relu()))


def test_what_is_not_finite_is_refused() -> None:
    torch.manual_seed(0)
    model, x = mlp(2, 8, 1), torch.randn(6, 2)
    bad = x.clone()
    bad[1], bad[4] = float("nan"), float("inf")
    for call in (lambda: Coverage(model, bad), lambda: Coverage(model, x).query(bad)):
        with pytest.raises(ValueError, match=r"x: it has NaN or infinity in 2 of 6 rows \(row 1, 4\)"):
            call()
    for value, message in ((float("nan"), "its output has NaN"), (-float("inf"), "parameter '0.bias' has NaN")):
        with torch.no_grad():
            model[0].bias[0] = value  # minus infinity: a unit that is off, and an output that is finite
        with pytest.raises(ValueError, match=message):
            Coverage(model, x)


def tokens(last: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(last, 1))


def dead_pooling() -> nn.Sequential:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 1))
    torch.nn.init.constant_(model[0].bias, -100.0)
    return model


def deep(width: int, layers: int) -> nn.Sequential:
    """All units on, so that the pattern is as long as it can be."""
    model = mlp(2, *[width] * layers, 1)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.rand_like(parameter) * 2 / width if parameter.dim() > 1 and i else parameter)
            if parameter.dim() == 1:
                parameter.fill_(0.01)
    return model


ODD_MODELS = {
    "tokens": (lambda: tokens(8), (2, 3)),
    "one token": (lambda: tokens(4), (1, 3)),
    "flattened first": (lambda: nn.Sequential(nn.Flatten(), *mlp(6, 4, 1)), (2, 3)),
    "dead pooling": (dead_pooling, (1, 7)),
    "very deep": (lambda: deep(40, 400), (2,)),
}


@pytest.mark.parametrize("name", few(ODD_MODELS, 3))
def test_models_at_the_edge(name: str) -> None:
    torch.manual_seed(0)
    make, shape = ODD_MODELS[name]
    model, x, queries = make().double(), torch.randn(12, *shape).double(), 3 * torch.randn(30, *shape).double()
    found, truth = Coverage(model, x).query(queries), local_lipschitz(model, queries).numpy()
    for bound in (found.bound, found.relaxed, found.nearest):
        assert (np.isnan(bound) | (bound >= truth * (1 - 1e-6) - 1e-9)).all()
    unknown = (found.status != "train") & (name == "tokens")  # ||M||: no chain of the layers' own widths
    assert np.array_equal(np.isnan(found.nearest), unknown)
    assert unknown.any() == (name == "tokens")


@pytest.mark.parametrize("places", [3, 40])
@pytest.mark.parametrize("rows", [(0, 5), (1, 1), (23, 17)])
def test_pooling_kernels_count_the_same_elements(places: int, rows: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    windows = 100 * np.arange(13)
    gates = []
    for count in rows:
        indices = (windows + random.integers(0, places, (count, 13))).astype(np.int32)
        gates.append(Patterns((PackedGate("pool", "index", 13, indices.view(np.uint8).reshape(count, 52)),)))
    mine, theirs = (gate.layers[0].bits() for gate in gates)
    truth = (mine[:, None] == theirs[None]).sum(2)
    log, whole = kernel(*gates, affine=True)
    assert np.allclose(np.exp(log), truth + 1)
    assert all(np.array_equal(part, truth + 1) for part in whole)
