"""watch() of what Accelerate has prepared, against a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, TensorDataset

import lipcore

accelerate = pytest.importorskip("accelerate", reason="needs the extra `trainers` (make test-ci)")
pytestmark = pytest.mark.ci
MAX_NORM = 0.5


@pytest.fixture(autouse=True)
def _without_what_others_left() -> Any:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01), DataLoader(data, batch_size=8)


def by_hand(accumulate: int, epochs: int = 1) -> tuple[list[float], list[float], Tensor]:
    """Update norms, gradient norms before clipping, and the parameters at the end."""
    model, optimizer, loader = made()
    moved, norms = [], []
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader, 1):
            (nnf.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate:
                continue
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
            before = flat(model)
            optimizer.step()
            optimizer.zero_grad()
            moved.append(float((flat(model) - before).norm()))
    return moved, norms, flat(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any, monitor: lipcore.Monitor) -> list[float]:
    norms = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nnf.cross_entropy(model(x), y)
            monitor.log(loss=loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_are_those_of_a_loop(tmp_path: Path, accumulate: int) -> None:
    moved, norms, end = by_hand(accumulate)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, loader = accelerator.prepare(*made())
    with lipcore.watch(model, optimizer, run=tmp_path / "run", window_steps=2) as monitor:
        clipped = epoch(accelerator, model, optimizer, loader, monitor)
    assert torch.equal(flat(model), end)
    assert np.allclose(clipped, norms, rtol=1e-6)
    with lipcore.open_run(tmp_path / "run") as run:
        found = run.series("update_norm", "total")
        assert found.steps.tolist() == list(range(1, 8 // accumulate + 1))
        assert np.allclose(found["total"], moved, rtol=1e-5)
        assert run.series("loss").steps.tolist() == found.steps.tolist()


def test_mixed_precision(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, loader = accelerator.prepare(*made())
    plain = made()[0]
    with lipcore.watch(model, optimizer, run=tmp_path / "run", window_steps=4) as monitor:
        epoch(accelerator, model, optimizer, loader, monitor)
    with lipcore.open_run(tmp_path / "run") as run:
        assert len(run.series("update_norm")) == 8
        distance = run.windows[-1]["trajectory"].distance["total"].last.value
        assert distance == pytest.approx(float((flat(model) - flat(plain)).norm()), rel=1e-5)


def test_a_resumed_run_is_one_history(tmp_path: Path) -> None:
    moved, _, end = by_hand(1, epochs=2)
    for life in (1, 2):
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(*made())
        with lipcore.watch(model, optimizer, run=tmp_path / "run", window_steps=4) as monitor:
            accelerator.register_for_checkpointing(monitor)
            if life == 2:
                accelerator.load_state(str(tmp_path / "checkpoint"))
            epoch(accelerator, model, optimizer, loader, monitor)
            if life == 1:
                accelerator.save_state(str(tmp_path / "checkpoint"))
                epoch(accelerator, model, optimizer, loader, monitor)  # lost: it is made again
    assert torch.equal(flat(model), end)
    with lipcore.open_run(tmp_path / "run") as run:
        found = run.series("update_norm", "total")
        assert found.steps.tolist() == list(range(1, 17))
        assert np.allclose(found["total"], moved, rtol=1e-5)
        assert [(start.kind, start.step) for start in run.starts] == [("start", 0), ("rewind", 8)]
