"""Where new tensors are made elsewhere by default (torch.set_default_device), numbers stay what and where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import mlp, seeded

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory, local_lipschitz


def flat(device: str, size: int, options: dict[str, Any]) -> dict[str, float]:
    model = seeded(lambda: mlp(5, 4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, fixed = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (size, 3))
    metrics = [Lipschitz(), Trajectory(**options), PerSampleGradNorms(loss_reduction="mean")]
    metrics.append(TensorStats(every_steps=2, logits="1", router={"0": 2}))
    for _ in range(2):  # the optimizer's state is made where its parameters are
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.device(device), Monitor(model, optimizer, metrics=metrics, window_steps=4) as monitor:
        monitor.probe(fixed, name="fixed")
        for _ in range(9):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = monitor.state_dict()
        monitor.load_state_dict(state)
        assert local_lipschitz(model, fixed).isfinite().all()
        return monitor.history[-1].flat()


@pytest.mark.parametrize("options", [{}, {"mode": "sketch"}, {"mode": "updates"}], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_another_default_device(size: int, options: dict[str, Any]) -> None:
    """The meta device stands for it: a tensor there has no values, and reading one raises."""
    found, expected = (flat(device, size, options) for device in ("meta", "cpu"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key
