"""Theorem 3: against the formula by hand, and where its radius is not defined."""

from __future__ import annotations

def test_theorem_3() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
    x = torch.randn(200, 3)
    y = (x[:, :1] > 0).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [Lipschitz()]) as monitor:
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy(model(x), y).backward()
            optimizer.step()
        monitor.close_window()
    found = theory.generalization(monitor.history, model, x, gamma=0.5, dimension=3.0, delta=0.1)
    f = model(x).detach().double()
    mu = float(torch.minimum(f, 1 - f).min())
    shares = np.concatenate(list(activation_patterns(model, x).activity().values()))
    assert (found.units, found.dead_units) == (11, int((shares == 0).sum()))
    p_min = shares[shares > 0].min()
    c = 1.5 * found.beta.value / (mu * (1 - mu) * p_min)
    radius = float((1 - 2 * f).abs().min()) / (c * math.log(11) * found.phi.value)
    assert found.c.value == pytest.approx(c)
    assert found.radius.value == pytest.approx(radius)
    assert found.lambda_steady.value == pytest.approx(found.phi.value * c / 4 * math.log(11))
    assert math.prod(found.factors.values()) == pytest.approx(1 / radius)
    assert found.killed_by == max(found.factors, key=found.factors.__getitem__)
    extent = float((x - x.mean(0)).double().norm(dim=1).max())
    cover = (1 + 2 * extent / radius) ** 3
    expected = math.sqrt((4 * math.log(2) * cover + 2 * math.log(10)) / 200)
    assert found.bound.value == pytest.approx(expected, rel=1e-3)
    assert found.vacuous
    assert found.dimension.note == "given"
    estimated = theory.generalization(monitor.history, model, x, gamma=0.5)
    assert estimated.dimension.label == "heuristic"
    with pytest.raises(ValueError, match="gamma"):
        theory.generalization(monitor.history, model, x, gamma=-1.0)
    with pytest.raises(ValueError, match="values in \\[0, 1\\].*logit"):
        theory.generalization(monitor.history, model[:-1], x, gamma=0.0)


