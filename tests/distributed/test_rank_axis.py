"""States of ranks in one checkpoint, without ranks: each entry is written and read once, whatever their numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import batches, mlp, seeded
from torch import nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory
from lipcore.distributed.rank_axis import Place, packed, read_back, spread, taken_over, unpacked

SIZES = [1, 2, 3, 5, 8, 256, 257]


@pytest.mark.parametrize("before", SIZES)
@pytest.mark.parametrize("after", SIZES[:5])
def test_each_rank_is_taken_over_once(before: int, after: int) -> None:
    written: dict[str, bytes] = {}
    for rank in {0, 1, before // 2, before - 1} & {*range(before)}:
        entries = spread(rank, Place(rank, before))
        assert not written.keys() & entries.keys()  # nobody writes what another does
        written |= entries
    found = [taken_over(Place(rank, after), before) for rank in range(after)]
    assert sorted(rank for each in found for rank in each) == list(range(before))
    if before <= 256:
        asked = [key for rank in range(after) for key in spread(0, Place(rank, after))]
        assert sorted(map(int, asked)) == list(range(256))  # which are there, whoever has written
        if before <= 3:
            assert read_back("ranks", written) == {rank: rank for rank in range(before)}


def test_ranks_that_are_apart_take_nothing_over() -> None:
    place = Place(2, 4, (2,), apart=True)
    assert taken_over(place, 4) == [2]
    assert list(spread("x", place)) == ["2"]
    assert place.key != Place(3, 4, (3,), apart=True).key


def test_entries_are_read_with_weights_only() -> None:
    entry = {"a": torch.arange(3), "b": [1, 2.5, "x", None, True], "c": {}}
    assert str(unpacked("here", packed(entry))) == str(entry)


def test_a_checkpoint_of_one_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Any, Monitor]:
        model = seeded(lambda: mlp(5, 7, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean"), Lipschitz(), TensorStats(every_steps=1)]
        return model, optimizer, Monitor(model, optimizer, metrics, window_steps=4)

    def train(model: nn.Module, optimizer: Any, begin: int, end: int) -> None:
        for x, y in batches(9, 4)[begin:end]:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    model, optimizer, monitor = made()
    train(model, optimizer, 0, 6)
    at_six = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "lipcore": monitor}
    dcp.save(at_six, checkpoint_id=tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    again, its_optimizer, resumed = made()
    loaded = {"model": again.state_dict(), "lipcore": resumed}
    dcp.load(loaded, checkpoint_id=tmp_path)
    its_optimizer.load_state_dict(state)
    train(again, its_optimizer, 6, 9)
    train(model, optimizer, 6, 9)
    for name in ("trajectory", "per_sample_grad_norm", "lipschitz"):  # a proof runs passes in which outputs are unseen
        one, other = (found.history[-1][name].to_dict() for found in (monitor, resumed))
        assert str(one) == str(other)
