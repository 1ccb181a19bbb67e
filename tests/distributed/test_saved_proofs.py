"""Checkpoints of ranks that have proved a batch, or have not: what a window is worth that goes on from one."""

from __future__ import annotations

import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_situations import Row, Run, batch
from ranks import run_ranks

pytestmark = pytest.mark.ci  # three processes, for 10 s
AT, END = 10, 21
#: Whether a batch is proved before the state is saved, and after it was loaded.
CASES = {"before": (True, False), "after": (False, True), "both": (True, True)}
WAYS = (2, 3)  # FSDP2 on two ranks goes on with so many


def proved(run: Run) -> dict[str, str]:
    return run.monitor.prove(batch(99, run.rank, run.ranks, False)[0])


def worth(window: Any) -> dict[str, Any]:
    norm, lambdas = window["per_sample_grad_norm"], window["lipschitz"].local_lipschitz["model"].mean
    label, count = norm.norm["total"].mean.label, norm.norm["total"].mean.count
    off = window["lipschitz"].details.get("local_lipschitz_off", "")
    doubts = sum(norm.details.get("not_proved", {}).values())
    return {"norm": [label, count, doubts], "lambda": [lambdas.label, lambdas.count, lambdas.valid], "off": off[:40]}


def saved_and_loaded(rank: int, world: int, name: str, folder: str) -> Any:
    before, after = CASES[name]
    for ranks, begin in ((2, 0), (world, AT)):
        if rank >= ranks:
            continue
        store = dist.FileStore(f"{folder}/store.{name}.{world}.{begin}", ranks)
        patience = datetime.timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
        run = Run(Row(name, "fsdp2", 2, "fsdp2", world, settings=(("timeout", 60),)), "fsdp2")
        with run.monitor:
            if begin == 0:
                if before:
                    assert not any(proved(run).values())
                run.train(0, AT)
                dcp.save(run.state(), checkpoint_id=f"{folder}/{name}.{world}")
            else:
                run.load(f"{folder}/{name}.{world}")
                if after:
                    assert not any(proved(run).values())
                run.train(AT, END)
        dist.destroy_process_group()
    return {"global": [worth(window) for window in run.windows], "own": [worth(window) for window in run.own]}


def work_through(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in CASES:
        for world in WAYS:
            if rank < max(2, world):
                found = saved_and_loaded(rank, world, name, folder)
                Path(folder, f"{name}.{world}.{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> dict[tuple[str, int], list[Any]]:
    folder = tmp_path_factory.mktemp("proofs")
    run_ranks(work_through, str(folder), ranks=3)
    return {
        (name, world): [json.loads((folder / f"{name}.{world}.{rank}.json").read_text()) for rank in range(world)]
        for name in CASES
        for world in WAYS
    }


@pytest.mark.parametrize("world", WAYS)
def test_a_proof_is_asked_for_again(found: dict[tuple[str, int], list[Any]], world: int) -> None:
    """Norms of passes behind the checkpoint are heuristic without it, and there is no lambda, by name."""
    for each in found["before", world]:
        first, second = each["global"]
        assert first["norm"] == ["heuristic", 84, 4 * world]  # of seven steps three were proved
        assert second["norm"] == ["heuristic", 84, 7 * world]
        for window in (first, second):
            assert not window["lambda"][2]
            assert window["off"].startswith("the model's parameters are sharded")


@pytest.mark.parametrize("world", WAYS)
def test_what_was_not_proved_before_stays_so(found: dict[tuple[str, int], list[Any]], world: int) -> None:
    for each in found["after", world]:
        first, second = each["global"]
        assert first["norm"] == ["heuristic", 84, 6]  # three steps of two ranks
        assert first["lambda"] == ["exact", 48, True]
        assert second == {"norm": ["exact", 84, 0], "lambda": ["exact", 84, True], "off": ""}
    own = [each["own"][0]["norm"] for each in found["after", world]]
    assert [label for label, *_ in own] == ["heuristic"] * 2 + ["exact"] * (world - 2)  # a third goes on from none
    assert sum(doubts for *_, doubts in own) == 6


@pytest.mark.parametrize("world", WAYS)
def test_proved_before_and_after_all_is_exact(found: dict[tuple[str, int], list[Any]], world: int) -> None:
    for each in found["both", world]:
        assert each["global"] == [{"norm": ["exact", 84, 0], "lambda": ["exact", 84, True], "off": ""}] * 2
