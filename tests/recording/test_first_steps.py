"""Steps before a checkpoint is loaded: torch's own recipe makes one, and the record says which call that was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import lipcore


def watched(folder: Path, first: bool) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """A Monitor of a new model and optimizer, whose states are asked for before it is made, or behind that."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    if first:
        get_state_dict(model, optimizer)
    monitor = lipcore.watch(model, optimizer, run=folder, window_steps=5)
    get_state_dict(model, optimizer)
    return monitor, model, optimizer


def train(monitor: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    with monitor:
        for _ in range(10):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return monitor.state_dict()


@pytest.mark.parametrize("first", [False, True])
def test_get_state_dict_of_a_new_optimizer(tmp_path: Path, first: bool) -> None:
    state = train(*watched(tmp_path / "a", first=True))
    monitor, *rest = watched(tmp_path / "a", first)
    monitor.load_state_dict(state)
    if first:
        train(monitor, *rest)
        assert not list((tmp_path / "a").glob("*.older"))
        return
    with pytest.warns(
        RuntimeWarning, match=r"get_state_dict\(model, optimizer\) makes one .* before the Monitor is made"
    ):
        train(monitor, *rest)


def test_slices_of_windows(tmp_path: Path) -> None:
    train(*watched(tmp_path / "a", first=True))
    windows = lipcore.open_run(tmp_path / "a").windows
    assert [window.last_step for window in windows[-1:]] == [10]
    assert [window.last_step for window in windows[::-1]] == [10, 5]
    assert (windows[-1].last_step, windows[5:]) == (10, [])
