"""The flight recorder of a model on a device: nothing waits for it, and the numbers are those of the samples."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import nothing_waits
from torch import nn

import lipcore
from lipcore.recording import open_run


@pytest.mark.gpu
@pytest.mark.parametrize("ids_on_device", [False, True])
def test_samples_of_a_model_on_a_device(tmp_path: Path, ids_on_device: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", noise_scale=False)
    seen: dict[int, Any] = {}
    with lipcore.watch(model, optimizer, metrics=[lipcore.Trajectory(), norms], run=tmp_path / "a") as monitor:
        inputs = [torch.randn(4, 3).cuda() for _ in range(70)]
        every = [torch.arange(10 * step, 10 * step + 4) for step in range(1, 71)]
        every = [ids.cuda() for ids in every] if ids_on_device else every
        for step in range(1, 71):
            quiet = contextlib.nullcontext() if step in (1, 2, 3, 4) or step > 60 else nothing_waits()
            with quiet:
                each = model(inputs[step - 1])[:, 0].square()
                monitor.log_batch(every[step - 1], losses=each)
                each.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            seen[step] = norms.per_sample, each.detach()
    with open_run(tmp_path / "a") as run:
        batches = run.batches()
    assert [batch.step for batch in batches] == list(range(1, 71))
    for batch in batches:
        assert batch.ids.tolist() == [10 * batch.step + i for i in range(4)]  # type: ignore[union-attr]
        for found, wanted in zip((batch.norms, batch.losses), seen[batch.step], strict=True):
            assert np.allclose(found, wanted.cpu().numpy(), rtol=1e-5)  # type: ignore[arg-type]
