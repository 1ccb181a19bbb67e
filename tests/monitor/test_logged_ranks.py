"""What the loops of several ranks have logged, in windows of all ranks: the numbers of one loop with all calls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from lipcore import Monitor, Trajectory, watch
from lipcore.distributed.packed import folded
from lipcore.metric import MetricResult
from lipcore.monitor.logged import Logged

RANKS = (3, 5, 8)
NAMES = ("mean", "min", "max", "last")


def together(calls: list[list[dict[str, float]]]) -> MetricResult | None:
    """The result of ranks that have made these calls, in steps from 1 on."""
    parts = []
    for own in calls:
        logged = Logged()
        for step, numbers in enumerate(own):
            logged.add(step, step, numbers)
        logged.result(1, len(own))
        parts.append(logged.part())
        assert logged.part().told["names"] == []  # once
    told = [json.loads(json.dumps(part.told)) for part in parts]
    for part in parts:
        part.turn_to(RANKS)
        part.hear(told)
    results = [part.result(folded(lambda: [part.packed() for part in parts])) for part in parts]
    assert len({repr(result and result.to_dict()) for result in results}) == 1
    return results[0]


def test_numbers_are_those_of_all_calls() -> None:
    losses = [[3.0, 1.0, 5.0], [2.0, -7.5], [0.125, 0.25, math.nan, 4.0]]
    result = together([[{"loss": loss, "lr": 0.1} for loss in each] for each in losses])
    assert result is not None
    loss, rate = result.loss["total"], result.lr["total"]
    finite = [one for each in losses for one in each if one == one]
    assert [loss[name].value for name in NAMES] == pytest.approx([np.mean(finite), -7.5, 5.0, (5.0 - 7.5 + 4.0) / 3])
    assert [loss[name].count for name in NAMES] == [8, 8, 8, 3]
    assert loss.mean.note == loss.max.note == "1 that are not finite are left out"
    assert [rate[name].value for name in NAMES] == [0.1] * 3 + [pytest.approx(0.1)]
    assert dict(result.details) == {"steps": [1, 4]}


def test_the_last_is_no_number_where_that_of_a_rank_is_none() -> None:
    result = together([[{"loss": 1.0}], [{"loss": math.inf}], [{"loss": 2.0}]])
    assert result is not None
    loss = result.loss["total"]
    assert (loss.mean.value, loss.mean.count, loss.max.value) == (1.5, 2, 2.0)
    assert not loss.last.valid
    nothing = together([[{"loss": math.nan}]] * 3)
    assert nothing is not None
    assert [nothing.loss["total"][name].valid for name in NAMES] == [False] * 4


def test_what_some_ranks_alone_have_logged_is_theirs_by_name() -> None:
    result = together([[{"loss": 1.0}], [{"loss": 2.0, "tokens": 8.0}, {"aux": 3.0}], []])
    assert result is not None
    assert result.details["logged_by"] == {"loss": [3, 5], "tokens": [5], "aux": [5]}
    assert result.tokens["total"].mean.value == 8.0
    assert result.tokens["total"].mean.note == result.aux["total"].last.note == "logged by rank 5 alone"
    assert result.loss["total"].mean.note == "logged by ranks 3, 5 alone"
    assert result.loss["total"].mean.value == 1.5


def test_nothing_is_logged_and_nothing_is_there() -> None:
    assert together([[], [], []]) is None


def trained(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for way in ("all", "one", "none"):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        written: list[dict[str, float]] = []
        losses = []
        settings: dict[str, Any] = {"window_steps": 4, "metrics": [Trajectory(stats=["update_norm"])], "timeout": 20}
        settings["writers"] = [lambda numbers, step, into=written: into.append(numbers)]
        with watch(model, optimizer, **settings) as monitor:
            for step in range(13):
                loss = model(torch.full((2, 4), float(rank + step))).square().mean()
                more = {} if way == "none" else {"loss": loss, **({"tokens": step} if rank or way == "all" else {})}
                monitor.log(**more)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        windows = monitor.global_history
        found[way] = {
            "losses": losses,
            "windows": [window["logged"].to_dict() if "logged" in window else None for window in windows],
            "own": [sorted(window.results) for window in monitor.history],
            "merged": [sorted(window.results) for window in windows],
            "off": [window.off for window in windows],
            "written": sorted({key for numbers in written for key in numbers if "logged" in key}),
        }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.ci
def test_windows_of_two_ranks_have_what_both_have_logged(tmp_path: Path) -> None:
    run_ranks(trained, str(tmp_path), 2, ranks=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for way in ("all", "one", "none"):
        found = [each[way] for each in ranks]
        assert found[0]["windows"] == found[1]["windows"]
        assert found[0]["off"] == [{}] * 3
        assert found[0]["merged"] == found[0]["own"]  # the same keys as of one rank
        for i, state in enumerate(found[0]["windows"] if way != "none" else []):
            result = MetricResult.from_dict("logged", state)
            losses = [loss for each in found for loss in each["losses"][4 * i : 4 * i + 4]]
            values = [result.loss["total"][name].value for name in NAMES]
            expected = [np.mean(losses), min(losses), max(losses), (losses[3] + losses[7]) / 2]
            assert values == pytest.approx(expected, rel=1e-6)
            assert result.details.get("logged_by", {}) == ({} if way == "all" else {"tokens": [1]})
        if way != "none":
            assert "lipcore/logged/loss.mean/total" in found[0]["written"]
    assert ranks[0]["none"]["written"] == []
    assert ranks[0]["none"]["windows"] == [None] * 3


@pytest.mark.ci
def test_probes_are_in_each_ranks_own_windows_alone(tmp_path: Path) -> None:
    run_ranks(probed, str(tmp_path), ranks=2)


def probed(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [Trajectory(stats=["update_norm"])], window_steps=1, timeout=20) as monitor:
        monitor.probe(torch.ones(2, 4), "ones")
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        window = monitor.global_window()
    assert list(window) == ["trajectory"]
    assert list(window.off) == ["probes"]
    assert "each rank's own are in pop_window() and history" in window.off["probes"]
    dist.destroy_process_group()
