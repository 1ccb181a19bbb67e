"""Samples that come twice in an epoch, or do not come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import AlarmEvent, sample_ids
from lipcore.alarms.id_set import IdSet


def trained(epochs: list[list[list[int]]], **settings: object) -> list[AlarmEvent]:
    """The events of a training on these batches of ids, a step each."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms="default") as monitor:
        for epoch, batches in enumerate(epochs):
            for ids in batches:
                monitor.log_batch(torch.tensor(ids), epoch=epoch)
                model(torch.randn(len(ids), 2)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.alarms is not None
    return monitor.alarms.events


def batches(ids: list[int], size: int = 4) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


ALL = list(range(100, 120))
MIXED = [*ALL[7:], *ALL[:7]]


LATE = batches(MIXED)
AGAIN, GONE = "came more than once in epoch {0}", "came in an earlier epoch, and not in epoch 1"
#: Epochs, and the step and words of the alarm that there is to be.
CASES: dict[str, tuple[list[list[list[int]]], tuple[int, str] | None]] = {
    "whole": ([batches(ALL), LATE, batches(ALL)], None),
    "a batch is missing": ([batches(ALL), LATE[:-1], batches(ALL)], (10, f"4 samples (103, 104, 105, 106) {GONE}")),
    "less than a batch": ([batches(ALL), [*LATE[:-1], LATE[-1][:3]], batches(ALL)], None),  # as drop_last leaves out
    "most": (
        [batches(ALL), batches(ALL[:4]), batches(ALL)],
        (7, f"16 samples (104, 105, 106, 107, 108, ...) {GONE}"),
    ),
    "a batch twice": (
        [batches(ALL), [*LATE[:2], LATE[1], *LATE[2:]]],
        (8, f"4 samples (111, 112, 113, 114) {AGAIN.format(1)}"),
    ),
    "twice in a batch": ([[[1, 2, 1]], [[1, 2, 3]]], (1, f"sample 1 {AGAIN.format(0)}")),
    "no positions": ([[[-1, 1 << 40, 3]], [[1 << 40, 3, -1, -1]]], (2, f"sample -1 {AGAIN.format(1)}")),
}


@pytest.mark.parametrize("name", CASES)
def test_epochs(name: str) -> None:
    epochs, expected = CASES[name]
    told = [(event.step, event.signal, event.place, event.message) for event in trained(epochs)]
    if expected is None:
        assert not told
    else:
        step, words = expected
        assert told == [(step, sample_ids.SIGNAL, "total", f"alarm in step {step}: {words}")]


def test_repeated_samples_are_told_once_in_an_epoch() -> None:
    events = trained([[[1, 2], [2, 3], [3, 4], [1, 4]], [[1, 2], [3, 4], [4, 5]]])
    assert [event.step for event in events] == [2, 7]


def test_behind_a_checkpoint_nothing_is_known_of_the_epoch() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms="default") as monitor:
        saved = monitor.state_dict()
        monitor.log_batch([1, 2, 3], epoch=0)
        monitor.load_state_dict(saved)
        monitor.log_batch([1, 2, 3], epoch=0)
        monitor.log_batch([4], epoch=1)
        assert monitor.alarms is not None
        assert not monitor.alarms.events


def test_without_alarms_or_an_epoch_nothing_is_looked_at() -> None:
    model = nn.Linear(2, 1)
    with lipcore.Monitor(model, metrics=[lipcore.Trajectory()]) as monitor:
        monitor.log_batch([1, 1], epoch=0)
    with lipcore.Monitor(model, metrics=[lipcore.Trajectory()], alarms="default") as monitor:
        monitor.log_batch([1, 1])
        assert monitor.alarms is not None
        assert not monitor.alarms.events
        with pytest.raises(ValueError, match="^ids: an epoch was given without the ids"):
            monitor.log_batch(epoch=1)
        with pytest.raises(ValueError, match="^epoch: expected an integer >= 0, got 1.5"):
            monitor.log_batch([1], epoch=1.5)  # type: ignore[arg-type]


def test_a_set_of_ids_is_a_set() -> None:
    rng = np.random.default_rng(0)
    mine, theirs, ours, other = IdSet(), IdSet(), set[int](), set[int]()
    for low, high in ((0, 50), (-5, 5), (1 << 26, (1 << 26) + 9), (1 << 40, (1 << 40) + 9)):
        for found, known in ((mine, ours), (theirs, other)):
            ids = rng.integers(low, high, 30)
            values, counts = np.unique(ids, return_counts=True)
            again = [v for v, n in zip(values.tolist(), counts.tolist(), strict=True) if n > 1 or v in known]
            assert found.add(ids).tolist() == again
            known |= set(ids.tolist())
    assert mine.without(theirs).tolist() == sorted(ours - other)
    assert theirs.without(mine).tolist() == sorted(other - ours)
    small = IdSet()
    small.add(np.array([1]))
    small.join(theirs)
    assert small.without(IdSet()).tolist() == sorted(other | {1})


@pytest.mark.gpu
def test_ids_on_a_device() -> None:
    found = sample_ids.SampleIds()
    found.add(1, 0, torch.tensor([3, 4, 3], device="cuda"))
    (event,) = found.events(wait=True)
    assert "sample 3 came more than once" in event.message
