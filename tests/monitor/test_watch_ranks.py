"""watch() on several ranks: log() is where they meet, and records and writers have the windows of all of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ranks import run_ways
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lipcore

pytestmark = pytest.mark.ci
STEPS, WINDOW = 12, 4


def data(rank: int, step: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(rank: int, folder: str, name: str, logs: tuple[int, ...]) -> dict[str, Any]:
    """Train under DDP; these ranks log."""
    model = DistributedDataParallel(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    written: dict[int, dict[str, float]] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with lipcore.watch(
            model, optimizer, run=f"{folder}/{name}", window_steps=WINDOW, timeout=0.5,
            writers=[lambda numbers, step: written.__setitem__(step, dict(numbers))],
        ) as monitor:  # fmt: skip
            for step in range(STEPS):
                loss = model(data(rank, step)).square().mean()
                if rank in logs:
                    monitor.log(loss=loss)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if len(logs) == 2:
                monitor.global_window()  # of the window that the last step has closed
            scopes = [window.scope for window in monitor.global_history]
    run = lipcore.open_run(f"{folder}/{name}", rank)
    return {
        "scopes": scopes,
        "recorded": [(window.last_step, window.scope) for window in run.windows],
        "norms": run.series("update_norm.mean", "total")["total"].tolist(),
        "lambdas": run.series("local_lipschitz.mean").values[:, 0].tolist(),
        "written": {step: numbers["lipcore/trajectory/update_norm.mean/total"] for step, numbers in written.items()},
        "told": [str(one.message) for one in told if "merges the windows" in str(one.message)],
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_ways(tmp_path_factory.mktemp("ranks"), train, {"both": {"logs": (0, 1)}, "first": {"logs": (0,)}})


def test_records_and_writers_have_the_windows_of_all_ranks(found: dict[str, list[dict[str, Any]]]) -> None:
    one, other = found["both"]
    assert one["scopes"] == other["scopes"] == ["global"] * 3
    assert one["recorded"] == other["recorded"] == [[4, "global"], [8, "global"], [12, "global"]]
    assert one["norms"] == other["norms"]
    assert one["lambdas"] == other["lambdas"]
    assert {int(step): number for step, number in one["written"].items()} == dict(
        zip((4, 8, 12), one["norms"], strict=True)
    )
    assert other["written"] == {}
    assert not one["told"] + other["told"]


def test_a_rank_that_logs_alone_goes_on_with_its_own(found: dict[str, list[dict[str, Any]]]) -> None:
    one, other = found["first"]
    assert [scope for _, scope in one["recorded"]] == ["rank"] * 3
    assert len(one["told"]) == 1
    assert "rank 0 has waited 0.5 s for rank 1" in one["told"][0]
    assert not other["told"]
    assert [int(step) for step in one["written"]] == [8, 12]
    assert one["weights"] == other["weights"] == found["both"][0]["weights"]
