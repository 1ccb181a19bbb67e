"""Theorem 2: bounds against the truth on many random networks, and the kernel form against the explicit programme."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipcore import local_lipschitz
from lipcore.regions import Coverage, activation_patterns

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
@pytest.mark.parametrize("seed", range(4))
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


@pytest.mark.parametrize("name", MAKERS)
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
