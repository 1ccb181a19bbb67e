"""Ranks of a sharded model whose batches would have them run other passes of lipcore's own: none waits for the other,
what is not proved is told, and the training goes on bit for bit."""

from __future__ import annotations

import datetime
import re
import types
from typing import Any

import pytest
import torch
from rank_runs import Found, run_situations
from torch import nn
from uneven_situations import situations

from lipcore.capture import proof_ranks
from lipcore.capture.proof_ranks import Ranks
from lipcore.capture.taps.collector import MicroBatch, inert_collector
from lipcore.capture.taps.sharded_check import ShardedCheck
from lipcore.capture.taps.site import Site

_NO_OUTPUT = "none of the model's outputs has a batch dimension"
_OTHERS = "the model is sharded, and on another rank the batch or the graph allows no such passes"
_COPIES = "statistics over the batch that the model may detach were not looked for: it is sharded"
#: What windows say on rank 0 and on rank 1; "" where nothing is proved at all.
WINDOWS = {
    "output": (_OTHERS, _NO_OUTPUT),
    "output_as_a_whole": (_OTHERS, _NO_OUTPUT),
    "empty": (_COPIES, _COPIES),
    "empty_as_a_whole": (_COPIES, _COPIES),
    "trial": ("", ""),
    "trial_of_one": ("", ""),
}
#: And what monitor.prove() says on both.
ASKED = {
    "output": f"rank 0: {_OTHERS}; rank 1: {_NO_OUTPUT}",
    "empty": "rank 0: statistics .* were not looked for: on another rank .*; rank 1: a batch of one sample has nothing",
}
ASKED |= {f"{name}_as_a_whole": words for name, words in ASKED.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    """What every rank has found; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "uneven_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    named = [*WINDOWS, *(f"{name}_asked" for name in ASKED), "mixes_on_one"]
    assert sorted(name for name, *_ in situations(2)) == sorted(named)


@pytest.mark.ci
@pytest.mark.parametrize("name", WINDOWS)
def test_the_training_goes_on(found: Found, name: str) -> None:
    for numbers, words in zip(found[name], WINDOWS[name], strict=True):
        assert isinstance(numbers, dict), numbers
        assert numbers["weights"]
        assert words in str(numbers["windows"][0]["not_proved"])


@pytest.mark.ci
@pytest.mark.parametrize("name", ASKED)
def test_proofs_that_are_asked_for(found: Found, name: str) -> None:
    for numbers in found[f"{name}_asked"]:
        assert isinstance(numbers, dict), numbers
        assert numbers["weights"]
        assert re.search(ASKED[name], numbers["answer"]["per_sample_grad_norm"])


@pytest.mark.ci
def test_a_flaw_that_one_rank_s_samples_show(found: Found) -> None:
    first, second = found["mixes_on_one"]
    assert "parts at other samples" in first["kept"]
    assert first["weights"]
    assert second["weights"]


_SITES: Any = (Site("first", print), Site("", print))


def _check(ranks: Ranks) -> ShardedCheck:
    """The checks of a rank whose layer named with input= stands alone."""
    tap: Any = types.SimpleNamespace(stands_alone=True, off="", by_product=True, begin_sharded=lambda checks: None)
    check = ShardedCheck(nn.Linear(1, 1), tap, inert_collector())
    check.ranks = ranks
    return check


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    """Two ranks of one model, in one process."""
    store, mesh = torch.distributed.HashStore(), types.SimpleNamespace(mesh=torch.arange(2), size=lambda: 2)
    monkeypatch.setattr(proof_ranks, "default_store", lambda: store)
    monkeypatch.setattr(proof_ranks, "mesh_of", lambda model: mesh)
    monkeypatch.setattr(proof_ranks, "_PATIENCE", datetime.timedelta(seconds=0.1))
    found = []
    for number in range(2):
        monkeypatch.setattr(proof_ranks, "rank", lambda number=number: number)
        found.append(Ranks(nn.Linear(1, 1)))
    return found


def test_whoever_comes_first_decides(ranks: list[Ranks]) -> None:
    one, other = ranks
    assert not one.settle("1", "")
    assert not other.settle("1", "some")  # at once
    assert not one.settle("2", "some")  # has waited
    assert not other.settle("2", "some")  # too late
    one.miss("3")
    assert not other.settle("3", "some")
    other.miss("3")  # which is told already
    assert not one.settle("4", "some")
    assert not other.settle("4", "others")


@pytest.mark.parametrize("when", ["before the pass", "in its first lines"])
def test_a_rank_that_refuses_what_it_has_announced(ranks: list[Ranks], when: str) -> None:
    """The others have no reason to wait for it: it has told them when its forward pass is over."""
    checks = [_check(each) for each in ranks]
    for check in checks:
        check.begin(*_SITES)
        check.end(MicroBatch(), raised=False)
    other = checks[1]
    assert ranks[0]._announced == ranks[1]._announced == {2}
    if when == "before the pass":
        other._tap.off = "a reason"
    for check in checks:
        check.begin(*_SITES)
    other._tap.off = "a reason"
    other.end(MicroBatch(), raised=False)
    assert ranks[0].agree(2)
    assert ranks[0]._store.check([f"{ranks[0]._key}/2/decision"])
    assert not ranks[0].settle("2", "check")


def test_a_store_that_is_gone(ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that has it may have ended: the others go on, in their forward passes too, and can close."""

    def gone(*arguments: Any) -> None:
        raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes")

    one = ranks[0]
    one.announce(1)
    monkeypatch.setattr(one, "_store", types.SimpleNamespace(add=gone, compare_set=gone))
    one.announce(2)
    assert not one.agree(1)
    one.skip(1)
    one.miss("3")
    one.withdraw(0)
    assert not one._announced


def test_checks_are_announced_as_early_as_they_are_known(ranks: list[Ranks]) -> None:
    """No pass may gather anything, so that nothing else makes a rank wait for the others' announcements."""
    check = _check(ranks[0])
    check.start()
    assert ranks[0]._announced == {1}
    for number, announced in enumerate(({1, 2}, {2, 4}, {4}, {4, 64}), 1):
        check.begin(*_SITES)
        assert {each for each in ranks[0]._announced if each >= number} == announced
        check.end(MicroBatch(), raised=True)


def test_ranks_that_run_the_same_passes(ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ranks
    found: list[bool] = []

    def meanwhile(keys: Any, patience: Any) -> None:
        found.append(other.settle("1", "some"))

    monkeypatch.setattr(one, "_store", waiting := types.SimpleNamespace())
    for name in ("add", "get", "compare_set"):
        setattr(waiting, name, getattr(other._store, name))
    waiting.wait = meanwhile
    assert one.settle("1", "some")
    assert found == [True]
