"""Corollaries 2 and 3: against formulas by hand, and every kind of step they are not about."""

from __future__ import annotations

from theory_runs import RATE, SIZE, Run

@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def test_corollary_2(run: Run) -> None:
    found = theory.bias_variance(run.history, "0.bias", learning_rate=RATE, eps=run.eps[-1])
    path = torch.stack(run.bias[-1])
    variance = float((path - path.mean(0)).square().sum() / (SIZE + 1))
    moves = path.diff(dim=0).norm(dim=1)
    shrink = SIZE / (4 * (SIZE + 1))
    assert found.variance.value == pytest.approx(variance, rel=1e-6)
    assert found.variance_over_lr_sq.value == pytest.approx(variance / RATE**2, rel=1e-6)
    assert found.lower.value == pytest.approx(shrink * float(moves.mean()) ** 2, rel=1e-6)
    lam = np.mean(run.lam[-1]) / float(run.sigma[0][0])
    assert found.printed.value == pytest.approx(shrink * (RATE * lam) ** 2, rel=1e-6)
    inverse = np.mean(np.array(run.eps[-1]) ** -2.0)
    assert found.lower_lipschitz.value == pytest.approx(shrink * (RATE * lam) ** 2 / inverse, rel=1e-6)
    assert found.lower_lipschitz.value <= found.lower.value <= found.variance.value
    assert found.printed.label == "heuristic"


def test_corollary_3(run: Run) -> None:
    eps_max = max(max(eps) for eps in run.eps)
    found = theory.bias_distance(run.history, "0.bias", learning_rate=RATE, eps_max=eps_max)
    distance = float((run.bias[-1][-1] - run.bias[0][0]).norm())
    length = sum(float(torch.stack(path).diff(dim=0).norm(dim=1).sum()) for path in run.bias)
    assert found.distance.value == pytest.approx(distance, rel=1e-6)
    assert found.length.value == pytest.approx(length, rel=1e-6)
    assert found.directness.value == pytest.approx(distance / length, rel=1e-6)
    assert found.bound.value == pytest.approx(RATE * eps_max * np.sum(run.lam) / float(run.sigma[0][-1]), rel=1e-6)
    assert found.bound.valid
    assert found.bound.value >= distance
    assert not theory.bias_distance(Run(inputs=3, width=5, epochs=1).history, "0.bias").bound.valid


